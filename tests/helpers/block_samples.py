"""Blocks between convolutions with inputs full of ties, and what a launcher gives its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from train.kernels.block import BlockSpec
from train.models.batch_norm import BatchNorm
from train.models.lrn import LocalResponseNorm

# Shapes: N samples, C channels, H and W rows and columns of a convolution's output.

# LRN's alpha is large, so that the normalisation is far from the identity.
SPECS = {
    "relu": BlockSpec(),
    "relu_pool": BlockSpec(pool=True),
    "relu_pool_padded": BlockSpec(pool=True, pool_padding=1),
    "relu_pool_ceil": BlockSpec(pool=True, pool_ceil=True),
    "lrn": BlockSpec("lrn", lrn_alpha=0.1),
    "lrn_pool": BlockSpec("lrn", pool=True, lrn_alpha=0.1),
    "lrn_pool_ceil": BlockSpec("lrn", pool=True, pool_padding=1, pool_ceil=True, lrn_alpha=0.1, lrn_k=1.0),
    "bn": BlockSpec("bn"),
    "bn_pool": BlockSpec("bn", pool=True),
    "bn_pool_padded": BlockSpec("bn", pool=True, pool_padding=1),
    "bn_after_relu": BlockSpec("bn_after_relu"),
    "bn_after_relu_pool": BlockSpec("bn_after_relu", pool=True),
    "bn_after_relu_pool_padded": BlockSpec("bn_after_relu", pool=True, pool_padding=1),
}


@dataclass(frozen=True)
class Sample:
    """Inputs of a block; bias and norm where it has them."""

    x_NCHW: Tensor
    bias_C: Tensor | None
    norm: BatchNorm | None


def make_sample(
    spec: BlockSpec,
    shape: tuple[int, int, int, int] = (2, 6, 7, 8),
    kind: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Sample:
    """Make inputs in steps of a half: in windows of 9 pixels most maxima are ties, of 0 and of more."""
    generator = torch.Generator().manual_seed(0)
    x_NCHW = (torch.randn(shape, generator=generator) * 3).round() / 2
    wide = torch.float64 if kind == torch.float64 else torch.float32
    bias_C = (torch.randn(shape[1], generator=generator) * 2).round() / 2
    norm = None
    if spec.has_batch_norm:
        norm = BatchNorm(shape[1]).to(device, wide)
        for values in (norm.weight, norm.bias, norm.running_mean):
            assert values is not None
            values.data.copy_(torch.randn(shape[1], generator=generator))  # weights of both signs
    return Sample(
        x_NCHW.to(device, kind).contiguous(memory_format=torch.channels_last),
        None if spec.norm == "bn" else bias_C.to(device, wide),
        norm,
    )


def make_grad(out_NCHW: Tensor) -> Tensor:
    """Make the gradient of an output, in its type and format."""
    grad_NCHW = torch.randn(out_NCHW.shape, generator=torch.Generator().manual_seed(1))
    return grad_NCHW.to(out_NCHW).contiguous(memory_format=torch.channels_last)


def make_modules(spec: BlockSpec, norm: BatchNorm | None) -> nn.Sequential:
    """Make the modules of `train.models.alexnet` that a block stands for."""
    modules: list[nn.Module] = [nn.ReLU()]
    if spec.norm == "lrn":
        modules.append(LocalResponseNorm(spec.lrn_size, spec.lrn_alpha, spec.lrn_beta, spec.lrn_k))
    if norm is not None:
        modules.insert(0 if spec.norm == "bn" else 1, norm)
    if spec.pool:
        modules.append(nn.MaxPool2d(3, 2, spec.pool_padding, ceil_mode=spec.pool_ceil))
    return nn.Sequential(*modules)


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel: what `compile_for` needs.

    Attributes:
        signature, constexprs: see `tests.helpers.triton.compile_for`.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]


TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.uint8: "*u8", torch.int64: "*i64",
}  # fmt: skip


@contextmanager
def recorded_launches(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Note launches of the modules' kernels in place of carrying them out."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    before = [(module, dict(vars(module))) for module in modules]
    try:
        for module, names in before:
            for name, kernel in names.items():
                if isinstance(kernel, JITFunction):
                    setattr(module, name, _Recorder(kernel, launches))
        yield launches
    finally:
        for module, names in before:
            vars(module).update(names)


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size >= 1 for size in grid)
        return self._launch

    def _launch(self, *arguments: Any, **constexprs: Any) -> None:
        signature = {}
        for name, value in zip(self.kernel.arg_names, arguments, strict=False):
            if value is None:
                constexprs[name] = None
            elif isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
            else:
                signature[name] = "i32" if value % 16 else "i32:16"
        self.launches.append(Launch(self.kernel, signature, constexprs))
