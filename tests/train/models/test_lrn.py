"""Local response normalisation against torch's own, forward and backward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from train.models.lrn import LocalResponseNorm, padded_window_sum, window_sum


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("channels", "size", "beta"), [(96, 5, 0.75), (3, 5, 0.75), (8, 3, 0.5), (1, 5, 0.75)]
)
def test_lrn_agrees_with_torch_forward_and_backward(
    channels: int, size: int, beta: float, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    # Large values and a large alpha, so that the normalisation is far from the identity.
    x = (torch.randn(2, channels, 6, 5) * 20).contiguous(memory_format=memory_format)
    grad = torch.randn_like(x)
    results = []
    for module in (LocalResponseNorm(size, 0.1, beta, 2.0), nn.LocalResponseNorm(size, 0.1, beta, 2.0)):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = module(leaf)
        out.backward(grad)
        results.append((out.detach(), leaf.grad))
    (ours, our_grad), (theirs, their_grad) = results
    assert (ours - x).abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_grad, their_grad, rtol=1e-5, atol=1e-5)
    assert ours.is_contiguous(memory_format=memory_format)


def closed_form(x: np.ndarray, grad: np.ndarray, size: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Output and gradient in float64, written out: alpha 1e-4, beta 0.75, k 2."""
    alpha, beta, k = 1e-4, 0.75, 2.0

    def window(values: np.ndarray) -> np.ndarray:
        reach = size // 2
        return np.stack(
            [values[:, max(0, c - reach) : c + reach + 1].sum(1) for c in range(values.shape[1])], axis=1
        )

    scale = k + alpha / size * window(x**2)
    inner = window(grad * x * scale ** (-beta - 1))
    return x * scale**-beta, grad * scale**-beta - 2 * alpha * beta / size * x * inner


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
)
@pytest.mark.parametrize(
    ("device", "fused"), [("cpu", False), pytest.param("cuda", True, marks=pytest.mark.gpu)]
)
def test_lrn_is_the_closed_form_in_every_type(
    device: str, fused: bool, dtype: torch.dtype, rtol: float, memory_format: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (
        (torch.randn(3, 96, 7, 5, generator=generator) * size)
        .to(dtype)
        .contiguous(memory_format=memory_format)
        for size in (200, 1)  # squares that float16 does not hold, and that weigh
    )
    module = LocalResponseNorm()
    module.fused = fused
    leaf = x.to(device, copy=True).requires_grad_()
    out = module(leaf)
    out.backward(grad.to(device))
    assert leaf.grad is not None and out.dtype == leaf.grad.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    want = closed_form(x.double().numpy(), grad.double().numpy())
    assert np.abs(want[0] - x.double().numpy()).max() > 50
    for found, expected in zip((out.detach(), leaf.grad), want, strict=True):
        np.testing.assert_allclose(found.double().cpu().numpy(), expected, rtol=rtol, atol=rtol)


def test_lrn_gradient_in_float64() -> None:
    x = torch.randn(2, 7, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LocalResponseNorm(5, 0.3, 0.75, 2.0), (x,))


def test_lrn_accumulates_in_float32_under_bfloat16() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 96, 6, 6) * 10
    exact = LocalResponseNorm()(x)
    half = LocalResponseNorm()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    # one rounding of the input and one of the output: no more than 2^-7 relative
    torch.testing.assert_close(half.float(), exact, rtol=2**-7, atol=1e-6)


def test_lrn_window_is_clipped_at_the_ends() -> None:
    x = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0]])
    assert window_sum(x, 5).tolist() == [[111.0, 1111.0, 11111.0, 111110.0, 111100.0, 111000.0]]


def test_lrn_refuses_an_even_window() -> None:
    with pytest.raises(ValueError, match="odd"):
        LocalResponseNorm(4)


def test_window_sum_forms_are_equal() -> None:
    x = torch.randn(2, 7, 3, 3)
    for size in (1, 3, 5):
        torch.testing.assert_close(padded_window_sum(x, size), window_sum(x, size))
