"""Plain and fast steps side by side, with all that changes from step to step; also the ranks of a test.

As a module: python -m tests.helpers.fast_steps, on each of several ranks; rank 0 prints one JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, partial

import click
import numpy as np
import torch
from torch import Tensor

from data_pipeline.loading.batches import Batch
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.erase import erase_boxes_at
from data_pipeline.transforms.mix import PAIR_SIZE, mix_params_at
from data_pipeline.transforms.sampler import rank_slice
from data_pipeline.transforms.trivial import trivial_params_at
from tests.helpers.recorder import Recorder
from tests.helpers.step_samples import CLASSES, parts_of
from tests.helpers.thin_networks import networks_with
from train.config.load import make_config
from train.distributed.world import World, open_world
from train.graphs.capture import Capture
from train.graphs.fast_step import FastStep
from train.health.metrics import AccuracyMeter
from train.step import StepFn, StepParts, train_step

CROP_PX, GLOBAL_BATCH, NUM_STEPS, BAD_STEP = 22, 8, 50, 23
AUGMENT = Augment(trivial=True, erase=0.5, mixup=0.4, cutmix=1.0)
SETS = (
    f"preprocessing.crop_px={CROP_PX}", f"preprocessing.resize_px={CROP_PX}", f"global_batch={GLOBAL_BATCH}",
    "model.stem_stride=1", "model.hidden_units=8", "model.dropout=0.5", "augment.mixup=0.4",
    "augment.cutmix=1.0",
    "ema_decay=0.9", "label_smoothing=0.1", "spike_factor=50", "log_every=1", "device=cpu",
)  # fmt: skip


def narrow_networks() -> AbstractContextManager[None]:
    """Networks of few channels, which take a hundredth of the time."""
    return networks_with(4, 6, 8, 8, 6)


def make_parts(world: World, *overrides: str, scaled: bool = False) -> StepParts:
    """Parts with class weights; with float16's loss scaler, which grows and shrinks soon, if `scaled`."""
    config = make_config("tiny-imagenet", [*SETS, "precision=fp32", *overrides])
    with narrow_networks():
        parts = parts_of(config, world)
    if scaled:
        scaler = torch.amp.GradScaler(world.device.type, init_scale=256.0, growth_interval=7)
        parts = replace(parts, scaler=scaler)
    return replace(parts, class_weights=torch.linspace(0.5, 1.5, len(CLASSES), device=world.device))


def batches_at(world: World, step: int, micro_batch: int = GLOBAL_BATCH) -> list[Batch]:
    """A step's micro-batches on a rank: noise, of which some samples could not be read."""
    return list(_batches_at(world.rank, world.world_size, step, micro_batch))


@cache  # a plain step and a fast one, and several cases, take the same
def _batches_at(rank: int, world_size: int, step: int, micro_batch: int) -> list[Batch]:
    random = np.random.default_rng(step)
    images = random.integers(0, 256, (GLOBAL_BATCH, CROP_PX, CROP_PX, 3), dtype=np.uint8)
    labels, readable = random.integers(0, len(CLASSES), GLOBAL_BATCH), random.uniform(size=GLOBAL_BATCH) > 0.1
    share, made = rank_slice(GLOBAL_BATCH, rank, world_size, PAIR_SIZE), []
    for start in range(share.start, share.stop, micro_batch):
        own = slice(start, min(start + micro_batch, share.stop))
        places = np.arange(own.start, own.stop) + GLOBAL_BATCH * step
        mix = mix_params_at(1, 0, places, AUGMENT, CROP_PX)
        assert mix is not None
        batch = Batch(
            images[own], labels[own], readable[own], places, places, (), (), step, own.stop == share.stop,
            trivial=trivial_params_at(1, 0, places, AUGMENT),
            erase=erase_boxes_at(1, 0, places, AUGMENT, CROP_PX),
            mix=mix.drop_invalid(readable[own]),
        )  # fmt: skip
        made.append(batch)
    return made


def rate_at(step: int) -> float:
    """A warm-up, and then a decay."""
    return 0.02 * min(1.0, (step + 1) / 10) * 0.97**step


def take_steps(
    parts: StepParts, step_fns: Sequence[StepFn], num_steps: int = NUM_STEPS, micro_batch: int = GLOBAL_BATCH
) -> list[AccuracyMeter]:
    """Take steps by these functions in turn; the class weights make the gradient of one NaN."""
    counts, weights = [], parts.class_weights
    assert weights is not None
    good = weights.clone()
    for step in range(num_steps):
        weights.copy_(torch.full_like(good, torch.nan) if step == BAD_STEP else good)
        batches = batches_at(parts.world, step, micro_batch)
        counts.append(step_fns[step % len(step_fns)](batches, rate_at(step), step))
    return counts


def state_of(parts: StepParts) -> dict[str, Tensor]:
    """All that steps change."""
    assert parts.ema is not None
    momenta = [state["momentum_buffer"] for state in parts.optimizer.state.values()]
    found = {f"weight {name}": tensor for name, tensor in parts.network.state_dict().items()}
    found |= {f"average {name}": tensor for name, tensor in parts.ema.values.items()}
    found |= {f"momentum {number}": tensor for number, tensor in enumerate(momenta)}
    found |= {f"guard {name}": tensor for name, tensor in parts.guard.state_dict().items()}
    scale = parts.scaler.state_dict()
    return found | {f"scaler {name}": torch.tensor(float(value)) for name, value in scale.items()}


def differing(one: StepParts, other: StepParts) -> list[str]:
    """Names of the state that is not the same to the bit."""
    states = state_of(one), state_of(other)
    return [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])]


def compare(
    world: World,
    overrides: Sequence[str],
    capture: Capture,
    *,
    scaled: bool = False,
    num_steps: int = NUM_STEPS,
    micro_batch: int = GLOBAL_BATCH,
) -> tuple[list[str], list[int]]:
    """Take as many plain steps and fast ones.

    Returns:
        What of the state differs in the end, and the steps whose counts do.
    """
    both = [make_parts(world, *overrides, f"micro_batch={micro_batch}", scaled=scaled) for _ in range(2)]
    plain = take_steps(both[0], [partial(train_step, both[0])], num_steps, micro_batch)
    fast = take_steps(both[1], [FastStep(both[1], capture)], num_steps, micro_batch)
    others = [
        step
        for step, (a, b) in enumerate(zip(plain, fast, strict=True))
        if not (torch.equal(a.integers, b.integers) and torch.equal(a.loss_sum, b.loss_sum))
    ]
    assert num_steps <= BAD_STEP or both[1].guard.read().total == 1
    return differing(*both), others


RANKS_CASES: dict[str, tuple[tuple[str, ...], int]] = {
    "paper": (("model.name=paper",), GLOBAL_BATCH),
    "ghost batches": (("model.name=bn", "model.norm_batch=2", "optimizer.momentum_form=paper"), 2),
}


def main() -> None:
    """Compare on these ranks, and let rank 0 print what differs on any."""
    torch.set_num_threads(1)
    with open_world("cpu") as world:
        found = {
            name: compare(world, sets, Recorder(), scaled=True, num_steps=30, micro_batch=micro_batch)
            for name, (sets, micro_batch) in RANKS_CASES.items()
        }
        gathered = world.gather_objects(found)
        if world.is_main:
            click.echo(json.dumps(gathered))


if __name__ == "__main__":
    main()
