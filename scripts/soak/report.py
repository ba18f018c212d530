"""The report of a soak: as data, and as text with Markdown tables."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from statistics import fmean

import msgspec

from data_pipeline.results.card import table
from scripts.soak.plan import DESCRIPTIONS, Kind


class InjectedFault(msgspec.Struct, kw_only=True):
    """One fault that was injected.

    Attributes:
        at_step: the last step done before it.
        ranks: the number of ranks at that time.
        what: what it hit, in words.
        survived: the run got past that step, by itself or by --resume auto, and logged what it had to.
        lost_s: seconds until a later step was done, starting again included.
        problems: why it counts as not survived.
    """

    kind: Kind
    at_step: int
    ranks: int
    what: str
    survived: bool = False
    lost_s: float = 0.0
    problems: list[str] = []


class RunReport(msgspec.Struct, kw_only=True):
    """One run under faults, compared with an undisturbed one.

    Attributes:
        seed: of the run and of its faults.
        ranks: number of ranks of each launch, in order.
        hits: the faults that were injected, in order.
        too_late: planned faults for which the run ended too soon.
        steps, steps_done: of the run; and of all its attempts together.
        state_equal, rows_equal: whether they equal the undisturbed run's, bit for bit; None where the number
            of ranks changed.
        samples_once: whether every sample of every epoch was seen exactly once.
        stream_equal: whether each step held the samples of the undisturbed run's step.
        failed_images: corrupted images that a step met, by name.
        wall_s, undisturbed_s: seconds from the first launch to the end; and of the undisturbed run.
    """

    seed: int
    ranks: list[int] = []
    hits: list[InjectedFault] = []
    too_late: int = 0
    steps: int
    steps_done: int = 0
    state_equal: bool | None = None
    rows_equal: bool | None = None
    samples_once: bool = False
    stream_equal: bool = False
    failed_images: list[str] = []
    wall_s: float = 0.0
    undisturbed_s: float = 0.0
    problems: list[str] = []

    @property
    def good(self) -> bool:
        """Whether every fault was survived and nothing was lost."""
        return not self.problems and all(hit.survived for hit in self.hits)


class Report(msgspec.Struct, kw_only=True):
    """A whole soak. `not_injected` has the reason for each kind of fault that was left out."""

    seed: int
    minutes: float
    wall_s: float
    rounds: list[RunReport]
    not_injected: dict[str, str]
    injected: dict[str, int] = {}
    survived: dict[str, int] = {}
    world_size_changes: int = 0
    lost_s: float = 0.0
    steps_done_again: int = 0
    good: bool = False

    def __post_init__(self) -> None:
        hits = [hit for run in self.rounds for hit in run.hits]
        self.injected = dict(Counter(hit.kind for hit in hits))
        self.survived = dict(Counter(hit.kind for hit in hits if hit.survived))
        self.world_size_changes = sum(a != b for run in self.rounds for a, b in pairwise(run.ranks))
        self.lost_s = round(sum(hit.lost_s for hit in hits), 1)
        self.steps_done_again = sum(run.steps_done - run.steps for run in self.rounds)
        self.good = bool(self.rounds) and all(run.good for run in self.rounds)


def readable(report: Report) -> str:
    """Format the report as text, its tables in Markdown."""
    num_hits, num_survived = sum(report.injected.values()), sum(report.survived.values())
    lines = [
        f"soak, seed {report.seed}: {report.wall_s / 60:.1f} minutes, {len(report.rounds)} runs, "
        f"{num_hits} faults injected, {num_survived} survived; "
        f"the number of ranks changed {report.world_size_changes} times",
        f"time lost to the faults: {report.lost_s:.0f} s, {report.steps_done_again} steps done again",
    ]
    for rows in (_fault_rows(report), _run_rows(report)):
        lines += ["", table([*rows[0]], [[*map(str, row.values())] for row in rows])]
    lines.append("")
    for number, run in enumerate(report.rounds, start=1):
        lines += [f"run {number}: {problem}" for problem in run.problems]
        for hit in run.hits:
            where = f"run {number}, {hit.kind} at step {hit.at_step} ({hit.what})"
            lines += [f"{where}: {problem}" for problem in hit.problems]
    lines.append("all good" if report.good else "NOT GOOD: see the lines above")
    return "\n".join(lines)


def _fault_rows(report: Report) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for kind, description in DESCRIPTIONS.items():
        lost = [hit.lost_s for run in report.rounds for hit in run.hits if hit.kind == kind]
        left_out = f" (left out: {report.not_injected[kind]})" if kind in report.not_injected else ""
        rows.append(
            {
                "fault": f"`{kind}`: {description}{left_out}",
                "injected": len(lost),
                "survived": report.survived.get(kind, 0),
                "seconds lost, mean": f"{fmean(lost):.1f}" if lost else "-",
            }
        )
    return rows


def _run_rows(report: Report) -> list[dict[str, object]]:
    return [
        {
            "run": number,
            "ranks": " ".join(map(str, run.ranks)),
            "faults": len(run.hits),
            "steps + again": f"{run.steps} + {run.steps_done - run.steps}",
            "last state": _verdict(run.state_equal),
            "rows": _verdict(run.rows_equal),
            "samples once": "yes" if run.samples_once and run.stream_equal else "NO",
            "corrupt": len(run.failed_images),
            "seconds": f"{run.wall_s:.0f} ({run.undisturbed_s:.0f} undisturbed)",
        }
        for number, run in enumerate(report.rounds, start=1)
    ]


def _verdict(equal: bool | None) -> str:
    return "not compared" if equal is None else "equal, bit for bit" if equal else "DIFFERENT"
