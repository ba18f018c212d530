"""Local response normalisation across channels, with its gradient in closed form.

`nn.LocalResponseNorm` composes padding, a 3-d average pooling and a power, keeps each intermediate for the
backward pass, and has no bfloat16 kernel on the CPU. Here both passes are written out, accumulate in
float32 whatever the input's type is, and save only the input and one scale per element. Fused by Inductor
(C++ on a CPU, Triton on a GPU) each is one pass over memory, or few; without a compiler several.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# Shapes: N batch, C channels, H and W rows and columns.

WindowSum = Callable[[Tensor, int], Tensor]


def window_sum(x_NCHW: Tensor, size: int) -> Tensor:
    """Sum over a window of `size` neighbouring channels, centred, clipped at the ends.

    Args:
        x_NCHW: any float tensor (N, C, ...).
        size: odd number of channels in the window.
    Returns:
        A tensor of the same shape, type and memory format.

    >>> window_sum(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 3)
    tensor([[3., 6., 9., 7.]])
    """
    channels = x_NCHW.shape[1]
    total = x_NCHW.clone()
    for shift in range(1, min(size // 2, channels - 1) + 1):
        total[:, shift:] += x_NCHW[:, :-shift]
        total[:, :-shift] += x_NCHW[:, shift:]
    return total


def padded_window_sum(x_NCHW: Tensor, size: int) -> Tensor:
    """Compute `window_sum` in a form that Inductor fuses into one pass without a copy."""
    reach, channels = size // 2, x_NCHW.shape[1]
    padded = pad(x_NCHW, (0, 0) * (x_NCHW.ndim - 2) + (reach, reach))
    total = padded[:, :channels]
    for shift in range(1, size):
        total = total + padded[:, shift : shift + channels]
    return total


def _power_minus_beta(scale: Tensor, beta: float) -> Tensor:
    # s^-0.75 = rsqrt(s) * sqrt(rsqrt(s)): two square roots are several times cheaper than a power.
    if beta == 0.75:
        root = scale.rsqrt()
        return root.sqrt().mul_(root)
    return scale.pow(-beta)


def _forward(
    x: Tensor, size: int, alpha: float, beta: float, k: float, sum_over: WindowSum
) -> tuple[Tensor, Tensor]:
    """Return the output, and the scale that the backward pass needs."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = sum_over(wide * wide, size).mul_(alpha / size).add_(k)
    return (_power_minus_beta(scale, beta) * wide).to(x.dtype), scale


def _backward(
    grad: Tensor, x: Tensor, scale: Tensor, size: int, alpha: float, beta: float, sum_over: WindowSum
) -> Tensor:
    x_wide, grad_wide = x.to(scale.dtype), grad.to(scale.dtype)
    # dx = g * s^-b - (2ab/n) * x * window_sum(g * x * s^(-b-1))
    direct = _power_minus_beta(scale, beta).mul_(grad_wide)
    inner = sum_over(direct * x_wide / scale, size)
    return direct.addcmul_(inner, x_wide, value=-2 * alpha * beta / size).to(x.dtype)


@cache
def _fused() -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """Compile both passes with Inductor: each shape once a process, cached on disk between processes."""
    return torch.compile(_forward, dynamic=False), torch.compile(_backward, dynamic=False)


class _LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float, fused: bool) -> Tensor:
        ctx.constants = (size, alpha, beta, fused)
        if fused:
            out, scale = _fused()[0](_any_batch(x), size, alpha, beta, k, padded_window_sum)
        else:
            out, scale = _forward(x, size, alpha, beta, k, window_sum)
        ctx.save_for_backward(x, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (grad,) = grads
        x, scale = ctx.saved_tensors
        size, alpha, beta, fused = ctx.constants
        if fused:
            known = _any_batch(grad), _any_batch(x), _any_batch(scale)
            dx = _fused()[1](*known, size, alpha, beta, padded_window_sum)
        else:
            dx = _backward(grad, x, scale, size, alpha, beta, window_sum)
        return dx, None, None, None, None, None


def _any_batch(tensor: Tensor) -> Tensor:
    """Detach a tensor and mark its batch size as dynamic, so that one kernel serves every batch size.

    The last batch is often smaller. Detached, because both passes are written out: the compiler must not
    derive another backward pass.
    """
    tensor = tensor.detach()
    torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor


class LocalResponseNorm(nn.Module):
    """b = a / (k + alpha/n * sum over n neighbouring channels of a^2) ^ beta.

    Alpha is divided by the window size, as in cuda-convnet, Caffe, ONNX and PyTorch: the paper's formula
    omits the division, the code that trained the paper's network has it.

    Args:
        size: channels in the window, odd.
        alpha, beta, k: the constants of the formula (k is called `bias` in ONNX).
    Attributes:
        fused: whether Inductor's kernels do the work; `train.compile.choose` sets it where that pays.
    Shape:
        (N, C, H, W) -> (N, C, H, W), same type and memory format.
    Source: Krizhevsky et al. 2012, section 3.3.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and positive, not {size}")
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            # One LRN node, which TensorRT maps to its own layer, where tracing would write nine operators.
            attributes: dict[str, Any] = {
                "size": self.size,
                "alpha": self.alpha,
                "beta": self.beta,
                "bias": self.k,
            }
            # In float32 even where the network is not: squares of float16 overflow from 256 on.
            wide = torch.onnx.ops.symbolic(
                "LRN", (x.float(),), attrs=attributes, dtype=torch.float32, shape=x.shape, version=13
            )
            return wide.to(x.dtype)
        out: Tensor = _LocalResponseNorm.apply(x, self.size, self.alpha, self.beta, self.k, self.fused)
        return out

    def extra_repr(self) -> str:
        """The constants, for `print(model)`."""
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
