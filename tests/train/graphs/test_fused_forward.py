"""The fast step with fused kernels, in their plain form on a CPU: it is proved right for every network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.loading.batches import Batch
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.mix import mix_params_at
from data_pipeline.transforms.trivial import trivial_params_at
from tests.helpers.plain_kernels import PLAIN
from tests.helpers.recorder import Recorder, run_every_time
from tests.helpers.step_samples import small_batch, small_trainer
from tests.helpers.thin_networks import networks_with
from train.distributed.world import World, open_world
from train.graphs.capture import CudaCapture
from train.graphs.choose import list_candidates
from train.graphs.fast_step import FastStep
from train.graphs.fused_forward import make_fused_step, why_modules
from train.graphs.prover import Prover
from train.health.metrics import AccuracyMeter
from train.inputs.pass_inputs import PassInputs
from train.kernels.interface import triton_kernels
from train.step import StepParts, count_losses, train_step

pytestmark = pytest.mark.slow

NETWORKS = {
    "paper": ("model.stem_stride=2",),
    "caffe": ("model.name=caffe", "optimizer.name=lars", "model.stem_stride=2"),
    "owt": ("model.name=owt", "optimizer.momentum_form=paper"),  # a stride of 1: no blocks of pixels
    "bn": ("model.name=bn", "model.pool_padding=1", "model.stem_kernel=5", "model.stem_stride=3"),
    # Of large maps torch adds up the statistics in float32 on a CPU: 7e-5 off where the block is 4e-7 off.
    "after": (
        "model.norm=bn_after_relu",
        "model.hidden_norm=true",
        "model.pool_padding=1",
        "model.stem_stride=4",
    ),
    "ghosts": ("model.name=bn", "model.norm_batch=2"),
}
SMALL = ("preprocessing.crop_px=56", "preprocessing.resize_px=56", "model.hidden_units=16", "ema_decay=0.9")


@pytest.fixture
def world() -> Iterator[World]:
    before = torch.get_num_threads()
    with networks_with(8, 12, 16, 16, 12), open_world("cpu") as one:
        torch.set_num_threads(1)
        yield one
    torch.set_num_threads(before)


def batch_of(size: int) -> Batch:
    """Images of noise with all that a step does to images."""
    random, places = np.random.default_rng(0), np.arange(size)
    images = random.integers(0, 256, (size, 56, 56, 3), dtype=np.uint8)
    augment = Augment(mixup=0.8, trivial=True)
    return replace(
        small_batch(),
        images=images,
        labels=places % 10,
        valid=places != 1,
        indices=places,
        positions=places,
        trivial=trivial_params_at(0, 0, places, augment),
        erase=np.array([[3, 4, 9, 12]] * size),
        mix=mix_params_at(0, 0, places, augment, 56),
    )


# In bfloat16 the gradients of `after` are noise at this size: the plain step's are off by their length.
@pytest.mark.parametrize(
    ("network", "precision"),
    [*((network, "fp32") for network in NETWORKS), ("paper", "bf16"), ("owt", "bf16"), ("bn", "bf16")],
)
def test_both_candidates_are_right(network: str, precision: str, world: World) -> None:
    parts = small_trainer(world, *SMALL, *NETWORKS[network], "global_batch=8", f"precision={precision}")
    batches = [batch_of(8)]
    for step in range(2):
        train_step(parts, batches, 1e-3, step)
    prover = Prover(parts, batches, rate=1e-3, step=2)
    for candidate in list_candidates(parts, Recorder, lambda: PLAIN):
        verdict, _ = prover.judge(candidate)
        assert verdict.against is None, candidate.name


def test_parts_without_a_kernel_are_named(world: World) -> None:
    def of(*overrides: str) -> tuple[str, ...]:
        return why_modules(small_trainer(world, *SMALL, *overrides))

    assert of("model.stem_stride=2") == ()
    (stem,) = of("model.name=owt")
    assert stem.startswith("features.0: the first convolution has a stride of 1")
    ghosts = of("model.name=bn", "model.norm_batch=2", "model.stem_stride=2")
    assert len(ghosts) == 5 and ghosts[0] == "features.conv1: ghost batches have statistics of their own"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("network", ["paper", "bn"])
def test_candidates_are_right_on_a_gpu(network: str, precision: str) -> None:
    with open_world("cuda") as world:
        more = (f"precision={precision}", "global_batch=32", "device=cuda", "model.stem_stride=2")
        parts = small_trainer(world, f"model.name={network}", *SMALL, *more)
        prover = Prover(parts, [batch_of(32)], rate=1e-3, step=0)
        for candidate in list_candidates(parts, lambda: CudaCapture(world.device), triton_kernels):
            verdict, _ = prover.judge(candidate)
            assert verdict.against is None, candidate.name


def test_work_that_is_not_captured_is_right_too(world: World) -> None:
    parts = small_trainer(world, *SMALL, "model.stem_stride=2", "global_batch=8", "precision=fp32")
    prover = Prover(parts, [batch_of(8)], rate=1e-3, step=0)
    candidate, _ = list_candidates(parts, lambda: run_every_time, lambda: PLAIN)
    assert candidate.name == "graph and fused kernels"
    assert prover.judge(candidate)[0].against is None


def nodes_behind(tensor: torch.Tensor) -> set[Any]:
    """All nodes of a tensor's graph."""
    found: set[Any] = set()
    left = [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [one for one, _ in node.next_functions]
    return found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fused", [False, True])
def test_passes_do_not_end_at_the_nodes_that_ddp_keeps(
    world: World, monkeypatch: pytest.MonkeyPatch, precision: str, fused: bool
) -> None:
    """Those belong to the stream on which DDP was made: with them no graph can be captured on a GPU."""
    parts = small_trainer(world, *SMALL, *NETWORKS["bn"], f"precision={precision}")
    ends: list[set[Any]] = []

    def seen(
        parts: StepParts, inputs: PassInputs, logits_NC: torch.Tensor, meter: AccuracyMeter
    ) -> torch.Tensor:
        ends.append({node.variable for node in nodes_behind(logits_NC) if hasattr(node, "variable")})
        return count_losses(parts, inputs, logits_NC, meter)

    monkeypatch.setattr("train.graphs.fast_step.count_losses", seen)
    step = make_fused_step(parts, run_every_time, PLAIN) if fused else FastStep(parts, run_every_time)
    step([batch_of(4)], 0.1, 0)
    parameters = list(parts.network.parameters())
    (leaves,) = ends
    assert len(leaves) == len(parameters) and leaves.isdisjoint(parameters)
    assert {leaf.data_ptr() for leaf in leaves} == {parameter.data_ptr() for parameter in parameters}
    assert all(parameter.grad is not None for parameter in parameters)
