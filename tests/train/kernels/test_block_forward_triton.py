"""A block's forward kernels against the plain form, by Triton's interpreter; and what they take of a card."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from tests.helpers.block_samples import SPECS, make_sample, recorded_launches
from tests.helpers.plain_kernels import block_forward
from tests.helpers.triton import CAPABILITIES, compile_for, interpreted, needs_triton
from train.kernels import block
from train.kernels.block import DEAD

pytestmark = [needs_triton, pytest.mark.slow]  # the interpreter, and compilations for every GPU


@pytest.mark.parametrize("name", SPECS)
def test_forward_kernels_save_what_the_plain_form_saves(name: str) -> None:
    from train.kernels import block_forward_triton

    spec = SPECS[name]
    sample = make_sample(spec)
    other = deepcopy(sample)
    with torch.no_grad(), interpreted(block_forward_triton):
        out_NCYX, saved = block_forward_triton.forward(spec, other.x_NCHW, other.bias_C, other.norm)
        plain_NCYX, plain = block_forward(spec, sample.x_NCHW, sample.bias_C, sample.norm)
    assert out_NCYX.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out_NCYX, plain_NCYX, rtol=1e-5, atol=1e-5)
    for key, expected in vars(plain).items():
        tensor = getattr(saved, key)
        assert (tensor is None) == (expected is None), key
        if tensor is None:
            continue
        assert tensor.dtype == expected.dtype and tensor.stride() == expected.stride(), key
        if key == "peaks_NCYX":  # anything where no gradient goes
            tensor, expected = (t.masked_fill(plain.index_NCYX == DEAD, 0) for t in (tensor, expected))
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)
    if spec.pool and spec.norm in ("none", "bn"):
        assert saved.index_NCYX is not None and len(torch.unique(saved.index_NCYX)) > 5
    if other.norm is not None and sample.norm is not None:
        for buffer, expected in zip(other.norm.buffers(), sample.norm.buffers(), strict=True):
            torch.testing.assert_close(buffer, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["relu_pool", "lrn_pool", "bn_pool", "bn_after_relu_pool"])
def test_forward_kernels_round_to_bfloat16(name: str) -> None:
    from train.kernels import block_forward_triton

    spec = SPECS[name]
    sample = make_sample(spec, (2, 32, 5, 6), torch.bfloat16)
    other = deepcopy(sample)
    with torch.no_grad(), interpreted(block_forward_triton):
        out_NCYX, _ = block_forward_triton.forward(spec, other.x_NCHW, other.bias_C, other.norm)
        plain_NCYX, _ = block_forward(spec, sample.x_NCHW, sample.bias_C, sample.norm)
    assert out_NCYX.dtype == torch.bfloat16
    torch.testing.assert_close(out_NCYX, plain_NCYX, rtol=2**-7, atol=1e-6)


def test_forward_kernel_keeps_what_is_not_a_number() -> None:
    from train.kernels import block_forward_triton

    for name in ("relu_pool", "lrn_pool", "relu"):
        spec = SPECS[name]
        sample = make_sample(spec, (1, 6, 5, 5))
        sample.x_NCHW[0, 2, 3, 4] = torch.nan
        with interpreted(block_forward_triton):
            out_NCYX, _ = block_forward_triton.forward(spec, sample.x_NCHW, sample.bias_C, None)
        plain_NCYX, _ = block_forward(spec, sample.x_NCHW, sample.bias_C, None)
        assert 0 < int(out_NCYX.isnan().sum()) < out_NCYX.numel()
        torch.testing.assert_close(out_NCYX, plain_NCYX, equal_nan=True)


def test_statistics_are_those_of_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.kernels import block_forward_triton

    monkeypatch.setattr(block, "TILE", 64)  # two rows of 32 channels
    monkeypatch.setattr(block, "MOST_PROGRAMS", 5)
    monkeypatch.setattr(block_forward_triton, "MERGED", 2)
    spec = SPECS["bn"]
    sample = make_sample(spec, (3, 32, 3, 3))
    sample.x_NCHW.add_(1000)  # a difference of squares would lose the variance
    other = deepcopy(sample)
    assert sample.norm is not None and other.norm is not None
    with torch.no_grad(), interpreted(block_forward_triton):
        found = block_forward_triton.statistics(spec, other.x_NCHW, None, other.norm)
        _, plain = block_forward(spec, sample.x_NCHW.double(), None, sample.norm)
    assert plain.mean_C is not None and plain.rstd_C is not None
    torch.testing.assert_close(found[0].double(), plain.mean_C, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1].double(), plain.rstd_C, rtol=1e-4, atol=0)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["relu", "relu_pool", "lrn_pool", "bn", "bn_pool", "bn_after_relu_pool"])
def test_forward_kernels_spill_nothing(name: str, capability: int) -> None:
    from train.kernels import block_forward_triton

    spec = SPECS[name]
    sample = make_sample(spec, (2, 96, 9, 9), torch.bfloat16)
    with recorded_launches(block_forward_triton) as launches:
        block_forward_triton.forward(spec, sample.x_NCHW, sample.bias_C, sample.norm)
    assert len(launches) == (3 if spec.has_batch_norm else 1)
    for launch in launches:
        resources = compile_for(launch.kernel, launch.signature, launch.constexprs, capability=capability)
        assert resources.spill_bytes == 0 and resources.registers <= 128, launch.kernel
