"""The regrouped first convolution against torch's on pixels, and what feeds it against the plain step's."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d

from tests.helpers.plain_kernels import s2d_inputs
from tests.helpers.stem_samples import ERASED, MIX, PREPROCESSING, mix_on_device, uint8_images
from train.config.schema import ModelConfig
from train.distributed.numerics import exact_float32
from train.inputs.erase import erase_inputs
from train.inputs.mixup import mix_inputs
from train.kernels.stem import s2d_shape, s2d_weights, why_plain
from train.models.alexnet import NETWORKS, Normalize, make_features
from train.models.init import Uninitialized

# Shapes: N samples, H and W rows and columns of pixels; D channels, B blocks along a side; O output channels.


class Convolved(NamedTuple):
    """A convolution's output and the gradients of its weights and bias."""

    output: Tensor
    weights: Tensor
    bias: Tensor


def convolve(images_NHWC: Tensor, kernel: int, stride: int, padding: int) -> tuple[Convolved, Convolved]:
    """Both forms in float64, with the same gradient of the output, of images that are normalised."""
    scale, shift = torch.rand(3).double() / 50, torch.randn(3).double()
    weights, bias = torch.randn(2, 3, kernel, kernel).double(), torch.randn(2).double()
    results, gradient = [], torch.empty(0)
    for regrouped in (False, True):
        leaves = weights.clone().requires_grad_(), bias.clone().requires_grad_()
        if regrouped:
            shape = s2d_shape(images_NHWC.shape[1], kernel, stride, padding)
            inputs = s2d_inputs(images_NHWC, scale, shift, shape, torch.float64)
            assert inputs.shape[1:] == (shape.channels, shape.blocks, shape.blocks)
            output = conv2d(inputs, s2d_weights(leaves[0], stride), leaves[1])
            assert output.shape[2:] == (shape.out_px, shape.out_px)
        else:
            inputs = (images_NHWC.double() * scale + shift).permute(0, 3, 1, 2)
            output = conv2d(inputs, leaves[0], leaves[1], stride, padding)
            gradient = torch.randn_like(output)
        torch.autograd.backward(output, gradient)
        assert leaves[0].grad is not None and leaves[1].grad is not None
        results.append(Convolved(output.detach(), leaves[0].grad, leaves[1].grad))
    return results[0], results[1]


@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("kernel", [3, 5, 7, 11])
def test_regrouped_convolution_is_torchs_with_its_gradients(kernel: int, stride: int) -> None:
    torch.manual_seed(kernel * stride)
    for padding in (0, 2, 5):
        for crop_px in (56, 64, 224, 227):
            plain, regrouped = convolve(uint8_images(1, crop_px), kernel, stride, padding)
            for name, ours, theirs in zip(Convolved._fields, regrouped, plain, strict=True):
                largest = theirs.abs().max()
                assert largest > 0.1
                assert (ours - theirs).abs().max() <= 1e-10 * largest, (name, padding, crop_px)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_regrouped_convolution_is_torchs_for_any_shape(data: st.DataObject) -> None:
    kernel, stride = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 6))
    padding = data.draw(st.integers(0, 6))
    crop_px = data.draw(st.integers(max(1, kernel - 2 * padding), 40))
    torch.manual_seed(0)
    plain, regrouped = convolve(uint8_images(2, crop_px), kernel, stride, padding)
    for ours, theirs in zip(regrouped, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("erased", [False, True])
def test_block_inputs_are_those_of_the_plain_step(mixed: bool, erased: bool) -> None:
    """Each pixel's place by strides, and not by a regrouping."""
    images, normalize = uint8_images(4, 13), Normalize(PREPROCESSING)
    plain = normalize(images)
    if erased:
        plain = erase_inputs(plain, torch.from_numpy(ERASED))
    if mixed:
        plain = mix_inputs(plain, mix_on_device(MIX))
    shape = s2d_shape(13, 5, 3, 2)
    inputs = s2d_inputs(
        images,
        normalize.scale,
        normalize.shift,
        shape,
        torch.float32,
        erase_N4=torch.from_numpy(ERASED) if erased else None,
        mix=mix_on_device(MIX) if mixed else None,
    )
    assert shape.blocks == 6 and shape.channels == 32
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    padded = nn.functional.pad(plain, (2, 3, 2, 3))  # 18 = 6 blocks of 3
    for row in range(3):
        for column in range(3):
            first = (row * 3 + column) * 3
            assert torch.equal(inputs[:, first : first + 3], padded[:, :, row::3, column::3])
    assert not inputs[:, 27:].any()
    half = s2d_inputs(images, normalize.scale, normalize.shift, shape, torch.bfloat16)
    whole = s2d_inputs(images, normalize.scale, normalize.shift, shape, torch.float32)
    assert torch.equal(half, whole.bfloat16()) and half.is_contiguous(memory_format=torch.channels_last)


def test_gradient_of_half_weights_keeps_their_type() -> None:
    weights = torch.randn(4, 3, 7, 7).bfloat16().requires_grad_()
    regrouped = s2d_weights(weights, 2)
    assert regrouped.shape == (4, 16, 4, 4) and regrouped.is_contiguous(memory_format=torch.channels_last)
    torch.autograd.backward(regrouped.sum())
    assert weights.grad is not None and torch.equal(weights.grad, torch.ones_like(weights))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "units"), [(torch.float32, 200), (torch.bfloat16, 4)])
def test_regrouped_convolution_on_a_gpu_is_torchs(dtype: torch.dtype, units: int) -> None:
    """Within rounding: the output of 363 products, and the weights' gradient of 12,100, in another order."""
    torch.manual_seed(0)
    weights = (torch.randn(64, 3, 11, 11) / 19).cuda()
    images, ones = torch.randint(0, 256, (4, 224, 224, 3)).byte().cuda(), torch.ones(3).cuda()
    shape, results, gradient = s2d_shape(224, 11, 4, 2), [], torch.empty(0)
    with exact_float32():
        for regrouped in (False, True):
            leaf = weights.to(dtype, memory_format=torch.channels_last).requires_grad_()
            if regrouped:
                blocks = s2d_inputs(images, ones / 128, -ones, shape, dtype)
                output = conv2d(blocks, s2d_weights(leaf, 4))
            else:
                inputs = (images.float() / 128 - 1).to(dtype).permute(0, 3, 1, 2)
                output = conv2d(inputs, leaf, stride=4, padding=2)
                gradient = torch.randn_like(output)
            torch.autograd.backward(output, gradient)
            assert leaf.grad is not None
            results.append((output.detach().float(), leaf.grad.float()))
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert (ours - theirs).abs().max() <= units * torch.finfo(dtype).eps * theirs.abs().max()


def test_stems_of_all_networks_are_regrouped_but_for_stride_1() -> None:
    for name in NETWORKS:
        for stride in (1, 2, 3, 4):
            with Uninitialized():
                conv = make_features(ModelConfig(name=name, stem_stride=stride))[0]  # type: ignore[arg-type]
            assert isinstance(conv, nn.Conv2d)
            reason = why_plain(conv)
            assert (reason is not None and "stride of 1" in reason) if stride == 1 else reason is None
    assert "not square" in str(why_plain(nn.Conv2d(3, 4, (3, 5), stride=2)))
    assert "not square" in str(why_plain(nn.Conv2d(3, 4, 3, stride=2, dilation=2)))
    assert "reads 6 channels" in str(why_plain(nn.Conv2d(6, 4, 3, stride=2)))


@pytest.mark.slow
def test_plain_forms_need_no_triton() -> None:
    """As with torch for the CPU, which comes without it."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from train.compile.update import update_weights
from tests.helpers.plain_kernels import s2d_inputs, update_parameter
from train.kernels.interface import SgdForm
from train.kernels.stem import s2d_shape
images, ones = torch.zeros(1, 8, 8, 3, dtype=torch.uint8), torch.ones(3)
weight, number = torch.ones(2), torch.tensor(0.5)
update_parameter(weight, None, weight.clone(), number, number * 0, SgdForm(0.0))
print(s2d_inputs(images, ones, ones, s2d_shape(8, 3, 2, 0), torch.float32).sum().item(), weight.tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "192.0 [0.5, 0.5]\n", done
