"""A block as a step of autograd: what it hands on, and Triton's kernels against the plain form on a GPU."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from tests.helpers.block_samples import SPECS, Sample, make_grad, make_modules, make_sample
from tests.helpers.plain_kernels import PLAIN, block_backward, block_forward
from train.kernels.block import BlockSpec
from train.kernels.fused_block import fused_block
from train.kernels.interface import Kernels, triton_kernels


def run_block(spec: BlockSpec, sample: Sample, kernels: Kernels = PLAIN) -> list[torch.Tensor]:
    """Return output and gradients, and the running statistics."""
    leaves = [t.clone().requires_grad_() for t in (sample.x_NCHW, sample.bias_C) if t is not None]
    norm = deepcopy(sample)
    if norm.norm is not None:
        leaves += [norm.norm.weight, norm.norm.bias]
    bias_C = None if sample.bias_C is None else leaves[1]
    out_NCYX = fused_block(leaves[0], spec, bias_C, norm.norm, kernels)
    torch.autograd.backward(out_NCYX, make_grad(out_NCYX))
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(found) == len(leaves)
    return [out_NCYX.detach(), *found, *(norm.norm.buffers() if norm.norm is not None else ())]


def test_gradients_go_to_all_parameters_in_their_types() -> None:
    spec = SPECS["bn_after_relu_pool"]
    sample = make_sample(spec, kind=torch.bfloat16)
    out_NCYX, dx_NCHW, *gradients = run_block(spec, sample)[:5]
    assert out_NCYX.dtype == dx_NCHW.dtype == torch.bfloat16
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3
    assert all(gradient.abs().max() > 0.1 for gradient in gradients)


def test_other_memory_formats_are_copied() -> None:
    spec = SPECS["relu_pool"]
    sample = make_sample(spec)
    planes = Sample(sample.x_NCHW.contiguous(), sample.bias_C, None)
    for ours, theirs in zip(run_block(spec, planes), run_block(spec, sample), strict=True):
        assert torch.equal(ours, theirs)


def test_block_keeps_no_map_that_it_does_not_read() -> None:
    sample = make_sample(SPECS["relu_pool"], (2, 6, 9, 9))
    out_NCYX = fused_block(sample.x_NCHW.requires_grad_(), SPECS["relu_pool"], sample.bias_C, None, PLAIN)
    assert out_NCYX.grad_fn is not None
    kept = [t for t in out_NCYX.grad_fn.saved_tensors if t is not None]  # type: ignore[attr-defined]
    assert [(tensor.dtype, tensor.numel()) for tensor in kept] == [
        (torch.uint8, 2 * 6 * 16),
        (torch.float32, 6),
    ]


def test_single_value_has_no_variance() -> None:
    spec = SPECS["bn"]
    sample = make_sample(spec, (1, 6, 1, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        make_modules(spec, sample.norm)(sample.x_NCHW)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        fused_block(sample.x_NCHW, spec, None, sample.norm, PLAIN)


# Not all of `SPECS`: every one is compiled on its first call.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["relu", "relu_pool_padded", "lrn_pool_ceil", "bn", "bn_pool", "bn_after_relu_pool_padded"]
)
def test_kernels_are_the_plain_form_on_a_gpu(name: str) -> None:
    sample = make_sample(SPECS[name], (4, 96, 13, 14), device="cuda")
    both = (run_block(SPECS[name], sample, kind) for kind in (triton_kernels(), PLAIN))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    first, again = (run_block(SPECS[name], sample, triton_kernels()) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("relu_pool", torch.bfloat16),
        ("lrn_pool", torch.bfloat16),
        ("bn_pool", torch.bfloat16),
        ("bn_after_relu_pool", torch.bfloat16),
        ("relu", torch.float16),
        ("bn_pool", torch.float16),
    ],
)
def test_kernels_round_as_the_plain_form_on_a_gpu(name: str, kind: torch.dtype) -> None:
    from train.kernels import block_backward_triton, block_forward_triton

    spec = SPECS[name]
    sample = make_sample(spec, (4, 192, 13, 14), kind, "cuda")
    other, rounding = deepcopy(sample), 2**-7 if kind == torch.bfloat16 else 2**-10
    with torch.no_grad():
        out_NCYX, _ = block_forward_triton.forward(spec, other.x_NCHW, other.bias_C, other.norm)
        plain_NCYX, saved = block_forward(spec, sample.x_NCHW, sample.bias_C, sample.norm)
        torch.testing.assert_close(out_NCYX, plain_NCYX, rtol=rounding, atol=1e-5)
        known = spec, saved, make_grad(plain_NCYX), sample.bias_C, sample.norm, sample.x_NCHW.shape[2:]
        ours, theirs = block_backward_triton.backward(*known), block_backward(*known)
    torch.testing.assert_close(ours.x_NCHW, theirs.x_NCHW, rtol=rounding, atol=1e-5)
    for key in ("bias_C", "norm_weight_C", "norm_bias_C"):
        torch.testing.assert_close(getattr(ours, key), getattr(theirs, key), rtol=1e-4, atol=1e-3)
