"""A block's backward kernels against the plain form, interpreted; and what they take of a card."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.block_samples import SPECS, Sample, make_grad, make_sample, recorded_launches
from tests.helpers.plain_kernels import block_backward, block_forward
from tests.helpers.triton import CAPABILITIES, compile_for, interpreted, needs_triton
from train.kernels import block
from train.kernels.block import BlockSpec, Gradients

pytestmark = [needs_triton, pytest.mark.slow]  # the interpreter, and compilations for every GPU


def both_gradients(spec: BlockSpec, sample: Sample) -> tuple[Gradients, Gradients]:
    """Return the kernels' and the plain gradients, of the same saved tensors."""
    from train.kernels import block_backward_triton, block_forward_triton

    with torch.no_grad():
        out_NCYX, saved = block_forward(spec, sample.x_NCHW, sample.bias_C, sample.norm)
        known = spec, saved, make_grad(out_NCYX), sample.bias_C, sample.norm, sample.x_NCHW.shape[2:]
        with interpreted(block_forward_triton, block_backward_triton):
            found = block_backward_triton.backward(*known)
        return found, block_backward(*known)


@pytest.mark.parametrize("name", SPECS)
def test_backward_kernels_give_the_plain_gradients(name: str) -> None:
    sample = make_sample(SPECS[name])
    found, plain = both_gradients(SPECS[name], sample)
    assert found.x_NCHW.is_contiguous(memory_format=torch.channels_last)
    for key, expected in vars(plain).items():
        gradient = getattr(found, key)
        assert (gradient is None) == (expected is None), key
        if gradient is not None:
            assert gradient.dtype == expected.dtype == torch.float32 and expected.abs().max() > 0.1
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["relu_pool", "lrn_pool", "bn_pool", "bn_after_relu_pool"])
def test_backward_kernels_round_to_bfloat16(name: str) -> None:
    sample = make_sample(SPECS[name], (2, 32, 5, 6), torch.bfloat16)
    found, plain = both_gradients(SPECS[name], sample)
    assert found.x_NCHW.dtype == torch.bfloat16
    torch.testing.assert_close(found.x_NCHW, plain.x_NCHW, rtol=2**-7, atol=1e-6)
    for key in ("bias_C", "norm_weight_C", "norm_bias_C"):
        gradient, expected = getattr(found, key), getattr(plain, key)
        if gradient is not None:
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-4)


def test_parts_are_added_up_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.kernels import block_backward_triton

    monkeypatch.setattr(block, "TILE", 64)  # two rows of 32 channels
    monkeypatch.setattr(block, "MOST_PROGRAMS", 5)
    monkeypatch.setattr(block_backward_triton, "MERGED", 2)
    sample = make_sample(SPECS["bn_after_relu_pool"], (3, 32, 4, 3))
    found, plain = both_gradients(SPECS["bn_after_relu_pool"], sample)
    again, _ = both_gradients(SPECS["bn_after_relu_pool"], sample)
    for key, expected in vars(plain).items():
        torch.testing.assert_close(getattr(found, key), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(getattr(found, key), getattr(again, key)), key


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["relu", "relu_pool", "lrn_pool", "bn", "bn_pool", "bn_after_relu_pool"])
def test_backward_kernels_spill_nothing(name: str, capability: int) -> None:
    from train.kernels import block_backward_triton

    spec = SPECS[name]
    sample = make_sample(spec, (2, 96, 9, 9), torch.bfloat16)
    with torch.no_grad():
        out_NCYX, saved = block_forward(spec, sample.x_NCHW, sample.bias_C, sample.norm)
    with recorded_launches(block_backward_triton) as launches:
        block_backward_triton.backward(
            spec, saved, make_grad(out_NCYX), sample.bias_C, sample.norm, sample.x_NCHW.shape[2:]
        )
    assert len(launches) == (sample.bias_C is not None) + 1 + 2 * spec.has_batch_norm
    for launch in launches:
        resources = compile_for(launch.kernel, launch.signature, launch.constexprs, capability=capability)
        assert resources.spill_bytes == 0 and resources.registers <= 255, launch.kernel
