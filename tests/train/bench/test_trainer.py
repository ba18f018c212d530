"""Launches of a step, by the profiler's events as torch names them on a GPU; its arithmetic; parts alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import alexnet

from train.bench.trainer import (
    PartsCase,
    bench_config,
    count_events,
    gemm_parts,
    gflop_of,
    lrn_parts,
)
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
    assert count_events(EVENTS, "cpu", 2) == {"operators": 8.0}


@pytest.mark.parametrize("network", ["torchvision", "owt", "paper", "bn", "caffe"])
def test_arithmetic_is_that_of_the_layers_with_their_groups(network: str) -> None:
    flops: list[int] = []

    def count(layer: nn.Module, _inputs: object, output: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        flops.append(2 * layer.weight.numel() * math.prod(output.shape[2:]))

    with torch.device("meta"):
        model = (
            alexnet()
            if network == "torchvision"
            else make_model(bench_config(network, 2, 64, "fp32", "cpu").model, num_classes=1000, crop_px=64)
        )
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(count)
        model(torch.empty(1, 3, 64, 64))
    assert len(flops) == 8
    assert gflop_of(network, 64) == pytest.approx((3 * sum(flops) - flops[0]) / 1e9, rel=1e-9)


def test_arithmetic_without_groups_matches_torchs_counter() -> None:
    with torch.device("meta"):
        model = make_model(bench_config("owt", 2, 64, "fp32", "cpu").model, num_classes=1000, crop_px=64)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(model(torch.empty(1, 3, 64, 64)).sum())
    assert gflop_of("owt", 64) == pytest.approx(counter.get_total_flops() / 1e9, rel=1e-9)


@pytest.mark.slow
def test_parts_have_the_rate_of_their_shortest_time() -> None:
    def make(device: str, count: float) -> dict[str, tuple[float, Callable[[], object]]]:
        assert device == "cpu"
        return {"images_per_s": (count, lambda: time.sleep(next(naps, 0.05)))}

    naps = iter([0.3, 0.3, 0.3, 0.3, 0.05, 0.3])
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        case = PartsCase(stack, "cpu", make, 6.0)
        rate = case.measure()["images_per_s"]
    assert 6 / 0.3 < rate <= 6 / 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("no_compile_threads")
def test_lrn_alone_runs_in_three_forms() -> None:
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        figures = PartsCase(stack, "cpu", lrn_parts, "channels_last", 2, 63).measure()
    assert list(figures) == ["torch_images_per_s", "eager_images_per_s", "fused_images_per_s"]
    assert min(figures.values()) > 0


def test_matrix_products_are_of_two_sides() -> None:
    parts = gemm_parts("cpu", "bf16")
    assert {figure: amount for figure, (amount, _) in parts.items()} == {
        "gflops_2048": pytest.approx(2 * 2048**3 / 1e9), "gflops_3072": pytest.approx(2 * 3072**3 / 1e9),
    }  # fmt: skip
    product = parts["gflops_2048"][1]()
    assert isinstance(product, Tensor) and product.shape == (2048, 2048) and product.dtype == torch.bfloat16
