"""What a soak found, for people and for programs."""

from __future__ import annotations

from collections import Counter

import msgspec

from scripts.soak.plan import DESCRIPTIONS, KINDS, Kind


class Hit(msgspec.Struct, kw_only=True):
    """One fault that was injected.

    Args:
        at_step: the last step that was done when it was.
        ranks: of the run at that time.
        what: the victim.
        survived: the run got past that step, by itself or by --resume auto, and said what it had to.
        lost_s: seconds until a later step than that one was done, starting again included.
        problems: why it counts as not survived.
    """

    kind: Kind
    at_step: int
    ranks: int
    what: str
    survived: bool = False
    lost_s: float = 0.0
    problems: list[str] = []


class Round(msgspec.Struct, kw_only=True):
    """One run under faults, and what it was compared with.

    Args:
        seed: of the run and of its faults.
        ranks: of each launch, in order.
        too_late: faults for which the run was over too soon.
        steps, steps_done: of the run; and of all its attempts together.
        state_equal, rows_equal: to the undisturbed run's, bit for bit; None where ranks came or went.
        samples_once: every sample of every epoch was seen exactly once.
        stream_equal: each step held the samples that the undisturbed run's step held.
        failed_images: corrupted images that a step met, by name.
        wall_s, undisturbed_s: from the first launch to the end; and of the undisturbed run.
    """

    seed: int
    ranks: list[int]
    hits: list[Hit]
    too_late: int
    steps: int
    steps_done: int
    state_equal: bool | None
    rows_equal: bool | None
    samples_once: bool
    stream_equal: bool
    failed_images: list[str]
    wall_s: float
    undisturbed_s: float
    problems: list[str]

    @property
    def good(self) -> bool:
        """Whether everything held."""
        return not self.problems and all(hit.survived for hit in self.hits)


class Report(msgspec.Struct, kw_only=True):
    """A whole soak. `not_injected` says why a kind of fault was left out."""

    seed: int
    minutes: float
    wall_s: float
    rounds: list[Round]
    not_injected: dict[str, str]
    injected: dict[str, int] = {}
    survived: dict[str, int] = {}
    world_size_changes: int = 0
    lost_s: float = 0.0
    steps_done_again: int = 0
    good: bool = False

    def __post_init__(self) -> None:
        hits = [hit for each in self.rounds for hit in each.hits]
        self.injected = dict(Counter(hit.kind for hit in hits))
        self.survived = dict(Counter(hit.kind for hit in hits if hit.survived))
        self.world_size_changes = sum(
            a != b for each in self.rounds for a, b in zip(each.ranks, each.ranks[1:], strict=False)
        )
        self.lost_s = round(sum(hit.lost_s for hit in hits), 1)
        self.steps_done_again = sum(each.steps_done - each.steps for each in self.rounds)
        self.good = bool(self.rounds) and all(each.good for each in self.rounds)


def readable(report: Report) -> str:
    """The report as text, its tables in Markdown."""
    num_hits, num_survived = sum(report.injected.values()), sum(report.survived.values())
    lines = [
        f"soak, seed {report.seed}: {report.wall_s / 60:.1f} minutes, {len(report.rounds)} runs, "
        f"{num_hits} faults injected, {num_survived} survived; "
        f"the number of ranks changed {report.world_size_changes} times",
        f"time lost to the faults: {report.lost_s:.0f} s, {report.steps_done_again} steps done again",
    ]
    lines += ["", *_table(["fault", "injected", "survived", "seconds lost, mean"], _fault_cells(report))]
    heads = [
        "run",
        "ranks",
        "faults",
        "steps + again",
        "last state",
        "rows",
        "samples once",
        "corrupt",
        "seconds",
    ]
    lines += ["", *_table(heads, _run_cells(report)), ""]
    for number, each in enumerate(report.rounds, start=1):
        lines += [f"run {number}: {problem}" for problem in each.problems]
        for hit in each.hits:
            where = f"run {number}, {hit.kind} at step {hit.at_step} ({hit.what})"
            lines += [f"{where}: {problem}" for problem in hit.problems]
    lines.append("all good" if report.good else "NOT GOOD: see the lines above")
    return "\n".join(lines)


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _fault_cells(report: Report) -> list[list[str]]:
    hits = [hit for each in report.rounds for hit in each.hits]
    rows = []
    for kind in KINDS:
        lost = [hit.lost_s for hit in hits if hit.kind == kind]
        left_out = f" (left out: {report.not_injected[kind]})" if kind in report.not_injected else ""
        rows.append(
            [
                f"`{kind}`: {DESCRIPTIONS[kind]}{left_out}",
                str(report.injected.get(kind, 0)),
                str(report.survived.get(kind, 0)),
                f"{sum(lost) / len(lost):.1f}" if lost else "-",
            ]
        )
    return rows


def _run_cells(report: Report) -> list[list[str]]:
    return [
        [
            str(number),
            " ".join(map(str, each.ranks)),
            str(len(each.hits)),
            f"{each.steps} + {each.steps_done - each.steps}",
            _verdict(each.state_equal),
            _verdict(each.rows_equal),
            "yes" if each.samples_once and each.stream_equal else "NO",
            str(len(each.failed_images)),
            f"{each.wall_s:.0f} ({each.undisturbed_s:.0f} undisturbed)",
        ]
        for number, each in enumerate(report.rounds, start=1)
    ]


def _verdict(equal: bool | None) -> str:
    return "not compared" if equal is None else "equal, bit for bit" if equal else "DIFFERENT"
