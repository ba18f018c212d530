"""One run under faults, and the undisturbed run that it must equal."""

from __future__ import annotations

import logging
import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from data_pipeline.datasets.image_folder import load_image_folder
from scripts.soak.disk import Disk
from scripts.soak.inject import Victim, answer, inject, replace_file
from scripts.soak.launch import Launch
from scripts.soak.plan import (
    KINDS,
    SETTINGS,
    STEPS_PER_EPOCH,
    Fault,
    next_ranks,
    steps_of,
)
from scripts.soak.report import Hit
from train.checkpoints.format import STATE
from train.checkpoints.load import find_checkpoint, verify_checkpoint
from train.checkpoints.safe_load import load_plain

log = logging.getLogger("train")

MARGIN_STEPS = {kind: 6 if kind == "fill_disk" else 2 for kind in KINDS}
"""With fewer steps to go a fault is too late: a full disk has to meet a checkpoint that is not the last."""

GOES_ON = ("fill_disk", "corrupt_image")
"""Faults that stop no process."""

RANKS = 2
"""Of the runs whose number of ranks never changes, and of the first launch of the others."""


@dataclass(frozen=True)
class Course:
    """What a run is to do; the same for the disturbed and the undisturbed one.

    Args:
        seed, epochs: of the run.
        folder: for its logs, evidence and data.
        demo: the demo data, which is copied.
    """

    seed: int
    epochs: int
    folder: Path
    demo: Path

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.epochs * STEPS_PER_EPOCH

    def prepare(self) -> None:
        """Make the folders, with a copy of the data: hard links, which are replaced and never written to."""
        shutil.copytree(self.demo, self.folder / "data", copy_function=os.link)
        (self.folder / "evidence").mkdir()

    def start(self, number: int, num_ranks: int, runs: Path) -> Launch:
        """Start or go on with the run."""
        sets = [f"--set={s}" for s in (*SETTINGS, f"seed={self.seed}", f"epochs={self.epochs}")]
        options = [f"--data={self.folder / 'data'}", f"--out={runs}", "--resume=auto", *sets]
        log_file = self.folder / f"launch-{number:04d}.log"
        return Launch(number, num_ranks, self.folder / "evidence", log_file, options)


class Disturbed:
    """A run under faults, started again with `--resume auto` as often as it takes.

    Args:
        plan: the faults.
        choices: numbers of ranks; another one for each launch, where there are several.
        runs: folder for the run.
        disk: where that lies, if it can be filled.
    """

    def __init__(
        self, course: Course, plan: list[Fault], choices: tuple[int, ...], runs: Path, disk: Disk | None
    ) -> None:
        self.course, self.choices, self.runs = course, choices, runs
        self.pending, self.num_launches = list(plan), len(plan) + 3
        self.victim = Victim(runs, course.folder / "data", disk, course.seed, course.epochs)
        self.ranks: list[int] = []
        self.hits: list[Hit] = []
        self.too_late = 0
        self.problems: list[str] = []
        self.wall_s = 0.0
        # Of the last fault, until the run has got past it: when it was, and the first attempt that counts.
        self._hit_time: float | None = None
        self._from_attempt = (0, 0)
        self._log_before = ""

    @property
    def run(self) -> Path:
        """The newest run's folder; a launch killed before its first checkpoint may have left another."""
        return max(path for path in self.runs.iterdir() if path.is_dir())

    def train(self) -> None:
        """Go through the whole run; what went wrong is in `problems` and in the hits."""
        started, ranks = time.monotonic(), RANKS
        with ExitStack() as stack:
            while True:
                launch = self.course.start(len(self.ranks), ranks, self.runs)
                stack.callback(launch.kill)
                self.ranks.append(ranks)
                self._watch(launch)
                code = launch.end()
                if code == 0:
                    self._settle(launch)
                    break
                if len(self.ranks) >= self.num_launches:
                    self.problems.append(f"given up after {len(self.ranks)} launches: see {launch.log}")
                    break
                self._log_before = launch.said()
                ranks = next_ranks(self.course.seed + len(self.ranks), ranks, self.choices)
        self.wall_s = time.monotonic() - started
        with_checkpoints = {path.parent.parent for path in self.runs.glob("*/checkpoints/step-*")}
        if len(with_checkpoints) > 1:
            self.problems.append(f"{len(with_checkpoints)} runs have checkpoints: one was not gone on with")

    def _watch(self, launch: Launch) -> None:
        while launch.running:
            attempt, step = launch.progress()
            if self._hit_time is not None:
                if (launch.number, attempt) >= self._from_attempt and step > self.hits[-1].at_step:
                    self._settle(launch)
            elif self.pending and step >= self.pending[0].step:
                self._hit(self.pending.pop(0), launch)
            time.sleep(0.03)

    def _hit(self, fault: Fault, launch: Launch) -> None:
        time.sleep(fault.delay_s)
        began = time.monotonic()
        left = self.course.total_steps - launch.progress()[1]
        hit = inject(fault, launch, self.victim) if left >= MARGIN_STEPS[fault.kind] else None
        if hit is None:
            self.too_late += 1
            return
        self.hits.append(hit)
        self._hit_time, self._log_before = began, ""
        attempt = launch.progress()[0]
        self._from_attempt = (launch.number, attempt if hit.kind in GOES_ON else attempt + 1)
        log.info(f"step {hit.at_step}, {launch.num_ranks} rank(s): {hit.kind}, {hit.what}")

    def _settle(self, launch: Launch) -> None:
        """The run has got past the last fault, or to its end."""
        if self._hit_time is None:
            return
        hit = self.hits[-1]
        hit.lost_s = round(time.monotonic() - self._hit_time, 1)
        answer(hit, launch, self._log_before + launch.said(), self.victim)
        hit.survived, self._hit_time = not hit.problems, None
        log.info(
            f"  survived, {hit.lost_s} s" if hit.survived else f"  NOT survived: {'; '.join(hit.problems)}"
        )


def train_undisturbed(
    course: Course, runs: Path, corrupted: dict[int, tuple[int, bytes]]
) -> tuple[Path, float]:
    """The same run without a fault, on `RANKS` ranks that never stop.

    Args:
        corrupted: images that go bad on the way: index -> the last epoch that reads it whole (-1: none), and
            the bytes that it has from then on.
    Returns:
        The run's folder, and the seconds it took.
    Raises:
        RuntimeError: it did not come to its end.
    """
    steps, path_at = (
        steps_of(course.seed, course.epochs),
        load_image_folder(course.folder / "data", "train").path_at,
    )
    # An image goes bad as soon as that epoch's step with it is done: the next one reads it some steps later.
    due = [
        (0 if epoch < 0 else int(steps[epoch, i]), i, content) for i, (epoch, content) in corrupted.items()
    ]
    due = sorted((step, i, content) for step, i, content in due if corrupted[i][0] < course.epochs - 1)
    started = time.monotonic()
    while due and due[0][0] == 0:
        _, index, content = due.pop(0)
        replace_file(path_at(index), content)
    launch = course.start(0, RANKS, runs)
    try:
        while launch.running:
            while due and launch.progress()[1] >= due[0][0]:
                _, index, content = due.pop(0)
                replace_file(path_at(index), content)
            time.sleep(0.02)
        if launch.end() != 0:
            raise RuntimeError(f"the undisturbed run failed: see {launch.log}")
    finally:
        launch.kill()
    (run,) = runs.iterdir()
    return run, time.monotonic() - started


def compare_runs(run: Path, undisturbed: Path) -> tuple[bool, bool]:
    """Whether two finished runs have the same last state and the same rows, bit for bit.

    The state is everything in the last checkpoint: weights, momentum, counters, position. Only the
    configuration differs, by the folders that it names.
    """
    states = []
    for path in (run, undisturbed):
        folder = find_checkpoint(path, pointer="last")
        verify_checkpoint(folder)
        states.append({k: v for k, v in load_plain(folder / STATE).items() if k != "config"})
    return same(*states), rows_of(run) == rows_of(undisturbed)


def same(one: Any, other: Any) -> bool:
    """Whether two trees of plain values and tensors are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(same(one[k], other[k]) for k in one)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, without what the clock says."""
    rows = [msgspec.json.decode(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time", "images_per_s")} for row in rows]
