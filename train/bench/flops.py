"""The arithmetic of a network, counted from its layers, and this machine's peak."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train.bench.harness import time_calls
from train.bench.steps import NUM_CLASSES
from train.bench.subjects import StepSpec
from train.bench.trainer import bench_config, wait_for
from train.models.alexnet import make_model

GEMM_SIDES = {"cpu": (2048, 3072), "cuda": (4096, 8192)}
GEMM_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def count_flops(model: nn.Module, crop_px: int) -> int:
    """Count an image's forward and backward pass: two operations for each multiply-add.

    Of convolutions and linear layers; the update of the weights is 1/100 of them. Counted on the meta device:
    torch's own counter ignores a backward pass's groups.

    Args:
        model: any network of convolutions and linear layers, (N, 3, crop_px, crop_px) in; it keeps the hooks.
    """
    counted: list[int] = []

    def count(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        assert isinstance(module.weight, Tensor)
        counted.append(2 * module.weight.numel() * math.prod(output.shape[2:]))

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    model(torch.empty(1, 3, crop_px, crop_px, device="meta"))
    # Gradients of weights and of inputs; the first layer's input is the image, which needs none.
    return 3 * sum(counted) - counted[0]


def flops_of(spec: StepSpec, crop_px: int) -> int:
    """Count a case's network; normalisations are not counted."""
    with torch.device("meta"):
        if spec.network == "torchvision":
            from torchvision.models import alexnet

            return count_flops(alexnet(num_classes=NUM_CLASSES), crop_px)
        model = bench_config(spec.network, spec.batch, crop_px, "fp32", "cpu").model
        return count_flops(make_model(model, num_classes=NUM_CLASSES, crop_px=crop_px), crop_px)


def gemm_gflops(precision: str, device: str) -> float:
    """Measure a few square matrix products; return the fastest, in 1e9 operations a second."""
    fastest = 0.0
    for side in GEMM_SIDES[device]:
        a, b = (torch.randn(side, side, device=device).to(GEMM_TYPES[precision]) for _ in range(2))
        _first, *others = time_calls(partial(torch.mm, a, b), 4, partial(wait_for, a.device))
        fastest = max(fastest, 2 * side**3 / min(others))
    return fastest / 1e9
