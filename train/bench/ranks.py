"""What the ranks of `alexnet bench scaling` do: torchrun … -m train.bench.ranks SPEC. Rank 0 prints JSON."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import click
import msgspec
import numpy as np
import torch
from torch import nn

from data_pipeline.datasets.dataset import Dataset
from train.bench.traffic import sent_bytes
from train.config.load import make_config
from train.distributed.world import World, open_world
from train.models.alexnet import AlexNet
from train.setup import make_step_parts
from train.step import StepParts, train_step
from train.tune.steps import noise_batch, wait_for

Mode = Literal["ddp", "ddp+bf16", "hybrid"]
SETTINGS: dict[Mode, tuple[str, ...]] = {
    "ddp": (),
    "ddp+bf16": ("compress=bf16",),
    "hybrid": ("parallel=hybrid",),
}
ALONE = "alone"
"""The same steps on as many ranks at the same time, of which none sends anything."""
WARM_UP = 3
"""Steps before those that count: DDP orders its buckets anew after the first."""


class ScalingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the ranks measure.

    Args:
        variant: which network.
        rank_batch: samples of a step on each rank.
        overrides: further keys of the configuration.
        steps: that are timed in each round.
        threads: of each rank, on a CPU.
    """

    variant: str
    modes: tuple[Mode, ...]
    rank_batch: int
    crop_px: int
    num_classes: int
    precision: str
    device: Literal["cpu", "cuda"]
    rounds: int
    steps: int
    threads: int
    overrides: tuple[str, ...] = ()


class RankFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it.

    Args:
        seconds: of a step, by mode and `alone`: one for each round, of the slowest rank.
        sent_bytes: by mode, in a step, of the rank that sends most, by the kernel; None on GPUs.
        formula_bytes: what docs/scaling.md says.
        world_size: how many ranks.
    """

    seconds: dict[str, list[float]]
    sent_bytes: dict[str, int | None]
    formula_bytes: dict[str, int | None]
    world_size: int


def measure(spec: ScalingSpec, world: World) -> RankFigures:
    """Take turns: each mode once a round, and the steps alone beside it."""
    seconds: dict[str, list[float]] = {}
    sent: dict[str, int | None] = {}
    formula: dict[str, int | None] = {}
    batch = noise_batch(spec.rank_batch, spec.crop_px, spec.num_classes)
    # One network at a time: four of them, with gradients and momentum, would not fit into a small machine.
    for _ in range(spec.rounds):
        for mode in spec.modes:
            trainer = _make(spec, mode, world)
            number = 0

            def step(trainer: StepParts = trainer) -> None:
                nonlocal number
                train_step(trainer, [batch], 0.0, number)
                number += 1

            for _ in range(WARM_UP):
                step()
            seconds.setdefault(mode, []).append(_time(step, spec.steps, world))
            sent[mode] = _sent(step, world)
            formula[mode] = _formula(trainer.network, spec, mode, trainer.precision.name, world.world_size)
            if mode == "ddp":
                with trainer.parallel.no_sync():
                    step()
                    seconds.setdefault(ALONE, []).append(_time(step, spec.steps, world))
            del trainer, step
            gc.collect()
    return RankFigures(seconds=seconds, sent_bytes=sent, formula_bytes=formula, world_size=world.world_size)


def _make(spec: ScalingSpec, mode: Mode, world: World) -> StepParts:
    values = {
        "model.name": spec.variant, "model.stem_stride": 4, "preprocessing.crop_px": spec.crop_px,
        "preprocessing.resize_px": spec.crop_px * 8 // 7, "precision": spec.precision, "device": spec.device,
        "global_batch": spec.rank_batch * world.world_size, "optimizer.name": "sgd",
    }  # fmt: skip
    texts = [f"{key}={value}" for key, value in values.items()]
    config = make_config("tiny-imagenet", [*texts, *spec.overrides, *SETTINGS[mode]])
    classes = tuple(f"class-{number}" for number in range(spec.num_classes))
    return make_step_parts(config, Dataset(Path(), "train", (), np.zeros(0, np.int64), classes), world, None)


def _time(step: Callable[[], None], count: int, world: World) -> float:
    """Seconds of a step, of the slowest rank."""
    times = []
    for _ in range(count):
        world.barrier()
        started = wait_for(world.device)
        step()
        times.append(wait_for(world.device) - started)
    (slowest,) = world.max(statistics.median(times))
    return slowest


def _sent(step: Callable[[], None], world: World) -> int | None:
    if world.device.type != "cpu":
        return None  # NCCL sends past the connections that the kernel counts
    world.barrier()
    before = sent_bytes()
    step()
    time.sleep(0.05)
    (most,) = world.max(sent_bytes() - before)
    return int(most)


def _formula(network: AlexNet, spec: ScalingSpec, mode: Mode, precision: str, ranks: int) -> int | None:
    """Bytes that each rank sends in a step: see docs/scaling.md."""
    layers = [module for module in network.modules() if isinstance(module, nn.Linear)]
    all_parameters = sum(p.numel() for p in network.parameters())
    there_and_back = 2 * (ranks - 1) / ranks
    if mode != "hybrid":
        return round(there_and_back * all_parameters * (2 if mode == "ddp+bf16" else 4))
    in_layers = sum(p.numel() for layer in layers for p in layer.parameters())
    features, hidden = layers[0].in_features, _hidden(spec)
    activation = 4 if precision == "fp32" else 2
    batch = spec.rank_batch * ranks
    moved = batch * ((features + hidden) * activation + 4 * spec.num_classes)
    return round(there_and_back * (4 * (all_parameters - in_layers) + moved))


def _hidden(spec: ScalingSpec) -> int:
    return make_config("tiny-imagenet", spec.overrides).model.hidden_units


def main(text: str) -> None:
    """Measure, and let rank 0 print."""
    spec = msgspec.json.decode(text, type=ScalingSpec)
    if spec.device == "cpu":
        torch.set_num_threads(spec.threads)
    with open_world(spec.device) as world:
        figures = measure(spec, world)
        if world.is_main:
            click.echo(msgspec.json.encode(figures))


if __name__ == "__main__":
    main(sys.argv[1])
