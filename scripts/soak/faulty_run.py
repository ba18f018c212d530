"""One run under faults, resumed until it ends, and the undisturbed run that it must equal."""

from __future__ import annotations

import logging
import os
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.datasets.image_folder import load_image_folder
from scripts.soak.disk import Disk
from scripts.soak.inject import Target, check_response, inject, replace_file
from scripts.soak.launch import Launch
from scripts.soak.plan import KINDS, SETTINGS, STEPS_PER_EPOCH, Fault, next_ranks, steps_of
from scripts.soak.report import InjectedFault

log = logging.getLogger("train")

MARGIN_STEPS = {kind: 6 if kind == "fill_disk" else 2 for kind in KINDS}
"""With fewer steps left a fault is too late: a full disk has to meet a checkpoint that is not the last."""

NON_STOPPING = ("fill_disk", "corrupt_image")
"""Faults that end no process."""

RANKS = 2
"""Ranks of the runs whose number never changes, and of the first launch of the others."""

MAX_EXTRA_LAUNCHES = 3
"""A fault ends at most one launch; a run that needs more launches than that and these is given up."""


@dataclass(frozen=True)
class RunSpec:
    """A run to make; the same one with faults and without.

    Attributes:
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
        """Start or resume the run."""
        sets = [f"--set={s}" for s in (*SETTINGS, f"seed={self.seed}", f"epochs={self.epochs}")]
        options = [f"--data={self.folder / 'data'}", f"--out={runs}", "--resume=auto", *sets]
        log_file = self.folder / f"launch-{number:04d}.log"
        return Launch(number, num_ranks, self.folder / "evidence", log_file, options)


class FaultyRun:
    """A run under faults, started again with `--resume auto` as often as it takes.

    Args:
        plan: the faults.
        choices: numbers of ranks; another one for each launch, where there are several.
        runs: folder for the run.
        disk: the disk of `runs`, if it can be filled.
    """

    def __init__(
        self, spec: RunSpec, plan: list[Fault], choices: tuple[int, ...], runs: Path, disk: Disk | None
    ) -> None:
        self.spec, self.choices, self.runs = spec, choices, runs
        self.pending, self.max_launches = list(plan), len(plan) + MAX_EXTRA_LAUNCHES
        self.target = Target(runs, spec.folder / "data", disk, spec.seed, spec.epochs)
        self.ranks: list[int] = []
        self.hits: list[InjectedFault] = []
        self.too_late = 0
        self.problems: list[str] = []
        self.wall_s = 0.0
        # Of the last fault, until the run is past it: its time, the first attempt that counts, earlier logs.
        self._hit_time: float | None = None
        self._from_attempt = (0, 0)
        self._log_before = ""

    @property
    def run(self) -> Path:
        """The newest run's folder; a launch killed before its first checkpoint may have left another."""
        return max(path for path in self.runs.iterdir() if path.is_dir())

    def train(self) -> None:
        """Train to the end under the faults; records what went wrong in `problems` and in the hits."""
        started, ranks = time.monotonic(), RANKS
        with ExitStack() as stack:
            while True:
                launch = self.spec.start(len(self.ranks), ranks, self.runs)
                stack.callback(launch.kill)
                self.ranks.append(ranks)
                self._watch(launch)
                if launch.end() == 0:
                    self._close_hit(launch)
                    break
                if len(self.ranks) >= self.max_launches:
                    self.problems.append(f"given up after {len(self.ranks)} launches: see {launch.log}")
                    break
                self._log_before = launch.log_text()
                ranks = next_ranks(self.spec.seed + len(self.ranks), ranks, self.choices)
        self.wall_s = time.monotonic() - started
        with_checkpoints = {path.parent.parent for path in self.runs.glob("*/checkpoints/step-*")}
        if len(with_checkpoints) > 1:
            self.problems.append(f"{len(with_checkpoints)} runs have checkpoints: one was not gone on with")

    def _watch(self, launch: Launch) -> None:
        """Inject the faults that are due, one at a time, until the launch ends."""
        while launch.running:
            attempt, step = launch.progress()
            if self._hit_time is not None:
                if (launch.number, attempt) >= self._from_attempt and step > self.hits[-1].at_step:
                    self._close_hit(launch)
            elif self.pending and step >= self.pending[0].step:
                self._inject(self.pending.pop(0), launch)
            time.sleep(0.03)

    def _inject(self, fault: Fault, launch: Launch) -> None:
        time.sleep(fault.delay_s)
        began = time.monotonic()
        left = self.spec.total_steps - launch.progress()[1]
        hit = inject(fault, launch, self.target) if left >= MARGIN_STEPS[fault.kind] else None
        if hit is None:
            self.too_late += 1
            return
        self.hits.append(hit)
        self._hit_time, self._log_before = began, ""
        attempt = launch.progress()[0]
        self._from_attempt = (launch.number, attempt if hit.kind in NON_STOPPING else attempt + 1)
        log.info(f"step {hit.at_step}, {launch.num_ranks} rank(s): {hit.kind}, {hit.what}")

    def _close_hit(self, launch: Launch) -> None:
        """Decide whether the run survived the last fault; called when it is past it, or at its end."""
        if self._hit_time is None:
            return
        hit = self.hits[-1]
        hit.lost_s = round(time.monotonic() - self._hit_time, 1)
        check_response(hit, launch, self._log_before + launch.log_text(), self.target)
        hit.survived, self._hit_time = not hit.problems, None
        log.info(
            f"  survived, {hit.lost_s} s" if hit.survived else f"  NOT survived: {'; '.join(hit.problems)}"
        )


def train_undisturbed(
    spec: RunSpec, runs: Path, corrupted: dict[int, tuple[int, bytes]]
) -> tuple[Path, float]:
    """Train the same run without a fault, on `RANKS` ranks that never stop.

    Args:
        corrupted: images that go bad on the way: index -> the last epoch that reads it whole (-1: none), and
            its bytes from then on.
    Returns:
        The run's folder, and the seconds it took.
    Raises:
        RuntimeError: it failed.
    """
    steps = steps_of(spec.seed, spec.epochs)
    path_at = load_image_folder(spec.folder / "data", "train").path_at
    # An image goes bad as soon as that epoch's step with it is done: the next one reads it some steps later.
    due = sorted(
        (0 if epoch < 0 else int(steps[epoch, index]), index, content)
        for index, (epoch, content) in corrupted.items()
        if epoch < spec.epochs - 1
    )

    def corrupt_until(step: int) -> None:
        while due and due[0][0] <= step:
            _, index, content = due.pop(0)
            replace_file(path_at(index), content)

    started = time.monotonic()
    corrupt_until(0)
    launch = spec.start(0, RANKS, runs)
    try:
        while launch.running:
            corrupt_until(launch.progress()[1])
            time.sleep(0.02)
        if launch.end() != 0:
            raise RuntimeError(f"the undisturbed run failed: see {launch.log}")
    finally:
        launch.kill()
    (run,) = runs.iterdir()
    return run, time.monotonic() - started
