"""The plain form of a block against the network's modules, forward and backward, in float64."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from tests.helpers.block_samples import SPECS, make_grad, make_modules, make_sample
from tests.helpers.plain_kernels import block_backward, block_forward
from train.kernels.block import DEAD, BlockSpec


@pytest.mark.parametrize("sides", [(7, 8), (8, 13), (3, 3)])
@pytest.mark.parametrize("name", SPECS)
def test_block_is_the_modules_forward_and_backward(name: str, sides: tuple[int, int]) -> None:
    spec = SPECS[name]
    sample = make_sample(spec, (3, 7, *sides), torch.float64)
    other = deepcopy(sample.norm)
    x_NCHW = sample.x_NCHW.clone().requires_grad_()
    bias_C = None if sample.bias_C is None else sample.bias_C.clone().requires_grad_()
    theirs_NCYX = make_modules(spec, other)(x_NCHW if bias_C is None else x_NCHW + bias_C[:, None, None])
    grad_NCYX = make_grad(theirs_NCYX)
    theirs_NCYX.backward(grad_NCYX)
    with torch.no_grad():
        ours_NCYX, saved = block_forward(spec, sample.x_NCHW, sample.bias_C, sample.norm)
        found = block_backward(spec, saved, grad_NCYX, sample.bias_C, sample.norm, x_NCHW.shape[2:])
    assert ours_NCYX.shape[2:] == spec.out_sides(*sides)
    assert ours_NCYX.is_contiguous(memory_format=torch.channels_last)
    close(ours_NCYX, theirs_NCYX.detach())
    close(found.x_NCHW, x_NCHW.grad)
    close(found.bias_C, None if bias_C is None else bias_C.grad)
    if sample.norm is not None and other is not None:
        close(found.norm_weight_C, other.weight.grad)
        close(found.norm_bias_C, other.bias.grad)
        for buffer, theirs in zip(sample.norm.buffers(), other.buffers(), strict=True):
            close(buffer, theirs)
        assert sample.norm.num_batches_tracked == 1


def close(ours: Tensor | None, theirs: Tensor | None) -> None:
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradient_in_bfloat16_is_that_of_float32_rounded() -> None:
    spec = SPECS["bn_after_relu_pool"]
    sample, wide = make_sample(spec, kind=torch.bfloat16), make_sample(spec)
    with torch.no_grad():
        out_NCYX, saved = block_forward(spec, sample.x_NCHW, sample.bias_C, sample.norm)
        _, wide_saved = block_forward(spec, wide.x_NCHW, wide.bias_C, wide.norm)
        assert out_NCYX.dtype == torch.bfloat16 and saved.mean_C is not None and wide_saved.mean_C is not None
        assert torch.equal(saved.mean_C, wide_saved.mean_C)  # halves are exact in both
        grad_NCYX = make_grad(out_NCYX)
        sides = sample.x_NCHW.shape[2:]
        found = block_backward(spec, saved, grad_NCYX, sample.bias_C, sample.norm, sides)
        expected = block_backward(spec, saved, grad_NCYX.float(), sample.bias_C, sample.norm, sides)
    assert torch.equal(found.x_NCHW, expected.x_NCHW.bfloat16())
    assert found.bias_C is not None and found.bias_C.dtype == torch.float32


def test_byte_is_dead_where_no_pixel_gets_a_gradient() -> None:
    x_NCHW = torch.tensor([[-1.0, 2.0, 2.0], [2.0, 0.0, -3.0], [-2.0, -1.0, 1.0]]).view(1, 1, 3, 3)
    for bias, byte in ((0.0, 1), (-2.0, DEAD), (-5.0, DEAD)):
        out_NCYX, saved = block_forward(BlockSpec(pool=True), x_NCHW, torch.tensor([bias]), None)
        assert saved.index_NCYX is not None and saved.index_NCYX.dtype == torch.uint8
        assert saved.index_NCYX.item() == byte and out_NCYX.item() == max(0.0, 2 + bias)
        assert saved.x_NCHW is None and saved.out_NCHW is None


@pytest.mark.parametrize("name", ["relu_pool", "lrn_pool", "relu"])
def test_block_keeps_what_is_not_a_number(name: str) -> None:
    spec = SPECS[name]
    sample = make_sample(spec)
    assert sample.bias_C is not None
    sample.x_NCHW[1, 2, 3, 4] = torch.nan
    out_NCYX, _ = block_forward(spec, sample.x_NCHW, sample.bias_C, None)
    theirs_NCYX = make_modules(spec, None)(sample.x_NCHW + sample.bias_C[:, None, None])
    assert out_NCYX.isnan().any()
    torch.testing.assert_close(out_NCYX, theirs_NCYX, equal_nan=True)
