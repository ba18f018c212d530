"""Local response normalisation across channels, with its gradient in closed form.

`nn.LocalResponseNorm` composes padding, a 3-d average pooling and a power, keeps each intermediate for the
backward pass, and has no bfloat16 kernel on the CPU. Here both passes are written out, accumulate in
float32 whatever the input's type is, and save only the input and one scale per element.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Shapes: N batch, C channels, H and W rows and columns.


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


def _power_minus_beta(scale: Tensor, beta: float) -> Tensor:
    # s^-0.75 = rsqrt(s) * sqrt(rsqrt(s)): two square roots are several times cheaper than a power.
    if beta == 0.75:
        root = scale.rsqrt()
        return root.sqrt().mul_(root)
    return scale.pow(-beta)


class _LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = window_sum(wide * wide, size).mul_(alpha / size).add_(k)
        ctx.save_for_backward(x, scale)
        ctx.constants = (size, alpha, beta)
        return (_power_minus_beta(scale, beta) * wide).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (grad,) = grads
        x, scale = ctx.saved_tensors
        size, alpha, beta = ctx.constants
        x_wide, grad_wide = x.to(scale.dtype), grad.to(scale.dtype)
        # dx = g * s^-b - (2ab/n) * x * window_sum(g * x * s^(-b-1))
        direct = _power_minus_beta(scale, beta).mul_(grad_wide)
        inner = window_sum(direct * x_wide / scale, size)
        dx = direct.addcmul_(inner, x_wide, value=-2 * alpha * beta / size)
        return dx.to(x.dtype), None, None, None, None


class LocalResponseNorm(nn.Module):
    """b = a / (k + alpha/n * sum over n neighbouring channels of a^2) ^ beta.

    Alpha is divided by the window size, as in cuda-convnet, Caffe, ONNX and PyTorch: the paper's formula
    omits the division, the code that trained the paper's network has it.

    Args:
        size: channels in the window, odd.
        alpha, beta, k: the constants of the formula (k is called `bias` in ONNX).
    Shape:
        (N, C, H, W) -> (N, C, H, W), same type and memory format.
    Source: Krizhevsky et al. 2012, section 3.3.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and positive, not {size}")
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

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
        out: Tensor = _LocalResponseNorm.apply(x, self.size, self.alpha, self.beta, self.k)
        return out

    def extra_repr(self) -> str:
        """The constants, for `print(model)`."""
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"
