"""Launches of a step, by the profiler's events as torch names them on a GPU, and its arithmetic."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from torch._C._autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

from train.bench.trainer import count_events, count_flops
from train.config.load import make_config
from train.models.alexnet import make_model


def event(key: str, count: int, *, gpu: bool = False, us: float = 0.0, note: bool = False) -> SimpleNamespace:
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    return SimpleNamespace(
        key=key, count=count, device_type=kind, self_device_time_total=us, is_user_annotation=note
    )


EVENTS = [
    event("aten::conv2d", 10),
    event("aten::copy_", 6),
    event("autograd::engine::evaluate_function: AddmmBackward0", 4),
    event("cudaLaunchKernel", 6),
    event("cudaLaunchKernelExC", 2),
    event("cuLaunchKernelEx", 2),
    event("cudaGraphLaunch", 2),
    event("cudaMemcpyAsync", 2),
    event("cudaMemsetAsync", 2),
    event("cudaDeviceSynchronize", 1),
    event("sm90_xmma_gemm", 20, gpu=True, us=3000.0),
    event("Memset (Device)", 2, gpu=True, us=1000.0),
    event("DistributedDataParallel.forward", 2, gpu=True, us=9000.0, note=True),
]


def test_launches_and_kernels_are_counted_for_a_step() -> None:
    expected = {"operators": 8.0, "launches": 8.0, "kernels": 11.0, "kernel_ms": 2.0}
    assert count_events(EVENTS, "cuda", 2) == expected
    assert count_events(EVENTS, "cpu", 2) == dict.fromkeys(expected) | {"operators": 8.0}


def test_flops_match_torchs_counter() -> None:
    with torch.device("meta"):
        model: nn.Module = make_model(
            make_config("demo", ["model.name=owt"]).model, num_classes=10, crop_px=64
        )
        counter = FlopCounterMode(display=False)
        with counter:
            loss = model(torch.empty(1, 3, 64, 64)).sum()
        forward = counter.get_total_flops()
        with counter:
            loss.backward()
    assert count_flops(model, 64) == forward + counter.get_total_flops() > 3 * 10**8
