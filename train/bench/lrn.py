"""LRN alone, forward and backward: torch's module, ours eager, and ours fused."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from train.models.lrn import LocalResponseNorm
from train.tune.steps import wait_for

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def bench_lrn(seconds: dict[str, dict[str, list[float]]], *, batch: int, crop_px: int, device: str) -> None:
    """Add one round: the first LRN of `paper`, in float32, in both memory formats.

    Args:
        seconds: by memory format and subject, a number a round; added to.
        batch: images.
        crop_px: side of the images, which gives that of the maps.
    """
    side = (crop_px + 4 - 11) // 4 + 1
    generator = torch.Generator(device=device).manual_seed(0)
    for name, memory_format in FORMATS.items():
        x = torch.randn(batch, 96, side, side, device=device, generator=generator)
        x = x.contiguous(memory_format=memory_format)
        fused = LocalResponseNorm()
        fused.fused = True
        modules = {
            "torch": nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0),
            "eager": LocalResponseNorm(),
            "fused": fused,
        }
        for key, module in modules.items():
            times = seconds.setdefault(name, {}).setdefault(key, [])
            if not times:
                _passes(module, x)  # compiles
            times.append(min(_passes(module, x) for _ in range(2)))


def _passes(module: Callable[[Tensor], Tensor], x: Tensor) -> float:
    leaf = x.detach().requires_grad_()
    started = wait_for(x.device)
    module(leaf).backward(x)  # type: ignore[no-untyped-call]
    return wait_for(x.device) - started
