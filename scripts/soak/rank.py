"""`train.main` that records the samples of each step: torchrun … -m scripts.soak.rank FOLDER LAUNCH …

Each rank of each attempt writes a file of its own, FOLDER/<launch>-<restart>-rank-<rank>-of-<world>.jsonl,
and never touches an earlier one. A record is written when a step's update is done, from the very batches that
the loader gave to it, not from the plan.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

import train.setup
from data_pipeline.loading.batches import Batch
from train.health.metrics import AccuracyMeter
from train.main import main
from train.step import StepParts, train_step

MIN_STEP_S = 0.4
"""A step takes at least so long: on a fast machine the run would be over before a fault that is planned for
one of its steps, and some tenths of a second after it."""


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One step of one rank.

    Attributes:
        step: optimiser steps finished with this one, counted from 1.
        indices: the samples that this rank put into it, as indices into the dataset.
        failed: those of them that could not be read, and had no weight.
    """

    step: int
    indices: list[int]
    failed: list[int]


def file_name(launch: int, restart: int, rank: int, world_size: int) -> str:
    """Name of an evidence file; sorted by name, a run's files are in the order of its attempts."""
    return f"{launch:04d}-{restart:04d}-rank-{rank}-of-{world_size}.jsonl"


def install(folder: Path, launch: int) -> None:
    """Make this process's training loop write records."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    path = folder / file_name(launch, restart, rank, world_size)
    target = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def recorded_step(
        parts: StepParts, batches: Sequence[Batch], learning_rate: float, step: int
    ) -> AccuracyMeter:
        earliest_end = time.monotonic() + MIN_STEP_S
        counts = train_step(parts, batches, learning_rate, step)
        assert all(batch.step == step for batch in batches)
        record = StepRecord(
            step=step + 1,
            indices=[int(i) for batch in batches for i in batch.indices],
            failed=[int(i) for batch in batches for i in batch.indices[~batch.valid]],
        )
        os.write(target, msgspec.json.encode(record) + b"\n")  # one call: a kill leaves a whole line or none
        time.sleep(max(0.0, earliest_end - time.monotonic()))
        return counts

    train.setup.train_step = recorded_step  # type: ignore[attr-defined]


if __name__ == "__main__":
    install(Path(sys.argv[1]), int(sys.argv[2]))
    main(sys.argv[3:])
