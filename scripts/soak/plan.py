"""The plan of a run: which faults hit it, and when. A pure function of a seed."""

from __future__ import annotations

import random
from typing import Literal, get_args

import msgspec
import numpy as np
import numpy.typing as npt

from data_pipeline.transforms.sampler import permutation_at

Kind = Literal[
    "kill_rank", "kill_all", "terminate", "flip_bit", "delete_checkpoint", "fill_disk", "corrupt_image"
]
KINDS: tuple[Kind, ...] = get_args(Kind)

DESCRIPTIONS: dict[Kind, str] = {
    "kill_rank": "SIGKILL to one rank; torchrun starts all ranks again",
    "kill_all": "SIGKILL to torchrun and every rank, as when the power fails",
    "terminate": "SIGTERM to torchrun",
    "flip_bit": "one bit of the newest checkpoint flipped while the ranks are down",
    "delete_checkpoint": "the newest checkpoint, its state or its manifest removed while the ranks are down",
    "fill_disk": "no byte left on the run's disk until a checkpoint could not be written",
    "corrupt_image": "a training image truncated, emptied or overwritten while the ranks run",
}

NUM_SAMPLES, GLOBAL_BATCH = 1442, 103
"""All training images of the demo, and a batch that divides them but is not divided by the ranks: each epoch
takes every image, and the ranks' shares are uneven."""
STEPS_PER_EPOCH = NUM_SAMPLES // GLOBAL_BATCH

READ_AHEAD_STEPS = 8
"""The most steps before its use that an image is read, where `data.prefetch` is 1."""

SETTINGS = (
    "preprocessing.resize_px=40", "preprocessing.crop_px=40", "augment.crop=random_resized", "precision=fp32",
    "model.name=owt", "model.hidden_units=64",
    f"global_batch={GLOBAL_BATCH}", "cpu_threads=1", "log_every=2", "checkpoint_every=4",
    "data.prefetch=1", "data.cache=none", "device=cpu", "timeout_s=60",
)  # fmt: skip
"""Overrides of the demo's recipe: smaller images, read each time; few hidden units; float32, many
checkpoints."""


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One fault.

    Attributes:
        kind: see `DESCRIPTIONS`.
        step: it is injected when the run has done this many steps…
        delay_s: …and this many seconds have passed since.
        draw: random bits for the choice of what it hits.
    """

    kind: Kind
    step: int
    delay_s: float
    draw: int


def make_plan(
    seed: int, *, num_faults: int, total_steps: int, kinds: tuple[Kind, ...] = KINDS
) -> list[Fault]:
    """Plan faults in the order of their steps: every kind once before any twice, spread over the run.

    Args:
        seed: of the plan; equal seeds give equal plans.
        num_faults: how many.
        total_steps: of the run.
        kinds: those to choose from.
    """
    generator = random.Random(seed)
    chosen: list[Kind] = []
    while len(chosen) < num_faults:
        chosen += generator.sample(kinds, len(kinds))
    first, last = 2, total_steps - 4  # a fault at the very end would meet a run that is over
    width = (last - first) / num_faults
    return [
        Fault(
            kind=kind,
            step=round(first + width * (number + generator.random())),
            delay_s=round(generator.uniform(0, 0.5), 3),
            draw=generator.getrandbits(60),
        )
        for number, kind in enumerate(chosen[:num_faults])
    ]


def next_ranks(draw: int, ranks: int, choices: tuple[int, ...]) -> int:
    """A number of ranks other than the present one, where there is another choice."""
    others = [choice for choice in choices if choice != ranks]
    return others[draw % len(others)] if others else ranks


def steps_of(seed: int, epochs: int) -> npt.NDArray[np.int64]:
    """The step that uses each image: (epochs, NUM_SAMPLES), counted from 1 through the whole run."""
    steps = np.empty((epochs, NUM_SAMPLES), dtype=np.int64)
    for epoch in range(epochs):
        order = permutation_at(seed, epoch, NUM_SAMPLES)
        steps[epoch, order] = epoch * STEPS_PER_EPOCH + np.arange(NUM_SAMPLES) // GLOBAL_BATCH + 1
    return steps


def corruptible(seed: int, epochs: int) -> npt.NDArray[np.int64]:
    """Indices of images that lie far enough apart in neighbouring epochs to be corrupted *between* the two.

    Whichever epoch was the last to read the image whole in the disturbed run, the undisturbed one can then
    have the same file corrupted between the same two epochs, without being stopped.
    """
    gaps = np.diff(steps_of(seed, epochs), axis=0)
    return np.flatnonzero((gaps >= READ_AHEAD_STEPS + 3).all(axis=0))
