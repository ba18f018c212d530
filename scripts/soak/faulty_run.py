"""One run under faults, resumed until it ends, and the undisturbed run that it must equal."""

from __future__ import annotations

import logging
import time

from data_pipeline.common.files import write_atomic
from scripts.soak.inject import Damage, check_response, inject
from scripts.soak.launch import Launch, RunSpec
from scripts.soak.plan import KINDS, Fault, next_ranks, steps_of
from scripts.soak.report import RunReport

log = logging.getLogger("train")

MARGIN_STEPS = {kind: 6 if kind == "fill_disk" else 2 for kind in KINDS}
"""With fewer steps left a fault is too late: a full disk has to meet a checkpoint that is not the last."""

NON_STOPPING = ("fill_disk", "corrupt_image")
"""Faults that end no process."""

RANKS = 2
"""Ranks of the runs whose number never changes, and of the first launch of the others."""

MAX_EXTRA_LAUNCHES = 3
"""A fault ends at most one launch; a run that needs more launches than that and these is given up."""


class FaultyRun:
    """A run under faults, started again with `--resume auto` as often as it takes.

    Args:
        plan: the faults.
        choices: numbers of ranks; another one for each launch, where there are several.
    """

    def __init__(self, spec: RunSpec, plan: list[Fault], choices: tuple[int, ...]) -> None:
        self.spec, self.choices = spec, choices
        self.pending, self.max_launches = list(plan), len(plan) + MAX_EXTRA_LAUNCHES
        self.damage = Damage()
        self.report = RunReport(seed=spec.seed, steps=spec.total_steps)
        # Of the last fault, until the run is past it: its time, the first attempt that counts, earlier logs.
        self._hit_time: float | None = None
        self._from_attempt = (0, 0)
        self._log_before = ""

    def train(self) -> None:
        """Train to the end under the faults; the report gets the launches, the hits and what went wrong."""
        started, num_ranks, report = time.monotonic(), RANKS, self.report
        for number in range(self.max_launches):
            report.ranks.append(num_ranks)
            with Launch(self.spec, number, num_ranks) as launch:
                self._watch(launch)
                if launch.ends_well():
                    self._close_hit(launch)
                    break
            self._log_before = launch.log_text()
            num_ranks = next_ranks(self.spec.seed + number + 1, num_ranks, self.choices)
        else:
            report.problems.append(f"given up after {len(report.ranks)} launches: see {launch.log}")
        report.wall_s = round(time.monotonic() - started, 1)
        with_checkpoints = {path.parent.parent for path in self.spec.runs.glob("*/checkpoints/step-*")}
        if len(with_checkpoints) > 1:
            report.problems.append(f"{len(with_checkpoints)} runs have checkpoints: one was not resumed")

    def _watch(self, launch: Launch) -> None:
        """Inject the faults that are due, one at a time, until the launch ends."""
        while launch.running:
            attempt, step = launch.progress()
            if self._hit_time is not None:
                if (launch.number, attempt) >= self._from_attempt and step > self.report.hits[-1].at_step:
                    self._close_hit(launch)
            elif self.pending and step >= self.pending[0].step:
                self._inject(self.pending.pop(0), launch)
            time.sleep(0.03)

    def _inject(self, fault: Fault, launch: Launch) -> None:
        time.sleep(fault.delay_s)
        began = time.monotonic()
        left = self.spec.total_steps - launch.progress()[1]
        hit = inject(fault, launch, self.damage) if left >= MARGIN_STEPS[fault.kind] else None
        if hit is None:
            self.report.too_late += 1
            return
        self.report.hits.append(hit)
        self._hit_time, self._log_before = began, ""
        attempt = launch.progress()[0]
        self._from_attempt = (launch.number, attempt if hit.kind in NON_STOPPING else attempt + 1)
        log.info(f"step {hit.at_step}, {launch.num_ranks} rank(s): {hit.kind}, {hit.what}")

    def _close_hit(self, launch: Launch) -> None:
        """Decide whether the run survived the last fault; called when it is past it, or at its end."""
        if self._hit_time is None:
            return
        hit = self.report.hits[-1]
        hit.lost_s = round(time.monotonic() - self._hit_time, 1)
        check_response(hit, launch, self._log_before + launch.log_text(), self.damage)
        hit.survived, self._hit_time = not hit.problems, None
        log.info(
            f"  survived, {hit.lost_s} s" if hit.survived else f"  NOT survived: {'; '.join(hit.problems)}"
        )


def train_undisturbed(spec: RunSpec, corrupted: dict[int, tuple[int, bytes]]) -> float:
    """Train the same run without a fault, on `RANKS` ranks that never stop.

    Args:
        corrupted: images that go bad on the way: index -> the last epoch that reads it whole (-1: none), and
            its bytes from then on.
    Returns:
        The seconds it took.
    Raises:
        RuntimeError: it failed.
    """
    steps = steps_of(spec.seed, spec.epochs)
    # An image goes bad as soon as that epoch's step with it is done: the next one reads it some steps later.
    due = sorted(
        (0 if epoch < 0 else int(steps[epoch, index]), index, content)
        for index, (epoch, content) in corrupted.items()
        if epoch < spec.epochs - 1
    )

    def corrupt_until(step: int) -> None:
        while due and due[0][0] <= step:
            _, index, content = due.pop(0)
            write_atomic(spec.image(index), content)

    started = time.monotonic()
    corrupt_until(0)
    with Launch(spec, 0, RANKS) as launch:
        while launch.running:
            corrupt_until(launch.progress()[1])
            time.sleep(0.02)
        if not launch.ends_well():
            raise RuntimeError(f"the undisturbed run failed: see {launch.log}")
    return time.monotonic() - started
