"""The harness of all benchmarks: cases in processes of their own, interleaved rounds, ratios, table, JSON.

Each round measures every case once, so that what else the machine does hits all of them alike. Figures are
medians over the rounds, ratios medians of the ratios within a round.
"""

from __future__ import annotations

import logging
import os
import pickle
import platform
import select
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from subprocess import PIPE, Popen
from typing import Any

from data_pipeline.common.machine import usable_cores
from data_pipeline.common.start import own_command

Report = dict[str, Any]  # the object that `--json` prints
Row = Mapping[str, Any]  # of a table: cells by heading, None where something was not measured
log = logging.getLogger("train")


class CaseError(RuntimeError):
    """A case failed, its process ended, or took longer than it may and was ended."""


class Case:
    """One thing to measure, in a process of its own that ends with `stack`; `build` makes it there.

    `make` gets a stack that the process closes at its end, and the arguments. Methods raise CaseError.
    """

    def __init__(self, stack: ExitStack, make: Callable[..., object], *arguments: object) -> None:
        # A plain interpreter: multiprocessing would change how torch's DataLoader starts its workers.
        command = own_command("train.bench.harness:serve")
        process = stack.enter_context(Popen(command, stdin=PIPE, stdout=PIPE))
        assert process.stdin is not None and process.stdout is not None
        self._process, self._arguments = process, arguments
        self._requests, self._replies = process.stdin, process.stdout
        self.limit(None)
        for sent in (sys.path, make):  # it imports what this process would
            pickle.dump(sent, self._requests)
        self._requests.flush()

    def build(self) -> None:
        """Build what is measured, in its process."""
        self.request(*self._arguments)

    def limit(self, seconds: float | None) -> None:
        """Let all requests from now on take so many seconds together; None for as long as they take."""
        self._limit_s = self._left_s = seconds

    def request(self, *method_and_arguments: object) -> Any:
        """Call a method of the case, by its name, in its process, and wait for what it returns."""
        started = time.perf_counter()
        try:
            pickle.dump(method_and_arguments, self._requests)
            self._requests.flush()
            if not select.select([self._replies], [], [], self._left_s)[0]:
                self._process.kill()
                raise CaseError(f"cut off after {self._limit_s:g} s")
            if self._left_s is not None:
                self._left_s = max(0.0, self._left_s - time.perf_counter() + started)
            reply = pickle.load(self._replies)
        except (EOFError, BrokenPipeError):
            raise CaseError(f"its process ended with code {self._process.wait()}") from None
        if isinstance(reply, CaseError):
            self._process.kill()  # what it holds on a device is free at once, whatever state that is in
            raise reply
        return reply


def serve() -> None:
    """Be the process of a case: answer the requests on stdin, until it ends or one fails."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print goes to stderr
    with ExitStack() as stack, suppress(EOFError):  # at the end of the benchmark
        sys.path[:] = pickle.load(sys.stdin.buffer)
        make = pickle.load(sys.stdin.buffer)  # imports its module
        case = _answer(make, stack, *pickle.load(sys.stdin.buffer))
        reply = case if isinstance(case, CaseError) else None
        while True:
            pickle.dump(reply, replies)
            replies.flush()
            if isinstance(reply, CaseError):
                return
            method, *arguments = pickle.load(sys.stdin.buffer)
            reply = _answer(getattr(case, method), *arguments)


def _answer(work: Callable[..., Any], *arguments: object) -> Any:
    """Return what a call returns, or why it failed, in a line; the traceback goes to stderr."""
    try:
        return work(*arguments)
    except Exception as error:
        traceback.print_exc()
        return CaseError(" ".join(f"{type(error).__name__}: {error}".split())[:200])


def _itself(_stack: ExitStack, function: Callable[..., object]) -> Callable[..., object]:
    return function


def run_alone(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a fresh process, whose memory is then the function's alone."""
    with ExitStack() as stack:
        case = Case(stack, _itself, function)
        case.build()
        return case.request("__call__", *arguments)


class Bench:
    """Cases that are measured in turns, and their figures; those that fail are left out, the others go on."""

    def __init__(self) -> None:
        self.cases: dict[str, Case] = {}  # those that run now, by name
        self.rounds: defaultdict[str, dict[str, list[float]]] = defaultdict(dict)  # of whole measurements
        self.facts: defaultdict[str, dict[str, Any]] = defaultdict(dict)  # what else is known of a case
        self.failures: dict[str, str] = {}  # why those that were left out failed

    def start(
        self, stack: ExitStack, cases: Mapping[str, tuple[Any, ...]],
        limits_s: Mapping[str, float | None] | None = None,
    ) -> None:  # fmt: skip
        """Start cases, given by what `Case` takes, and build one after the other within these limits."""
        self.cases = {name: Case(stack, *case) for name, case in cases.items()}
        for name, limit_s in (limits_s or {}).items():
            self.cases[name].limit(limit_s)
        for name, _ in self.each(Case.build):
            log.info(f"{name} is built")

    def each(
        self, work: Callable[[Case], Any], only: Container[str] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Do some work with each case, or with some of them alone; yield its name and the result."""
        for name, case in list(self.cases.items()):
            if only is None or name in only:
                try:
                    yield name, work(case)
                except CaseError as error:
                    del self.cases[name]
                    self.failures[name] = str(error)
                    log.warning(f"{name}: {error}")

    def note(self, method: str, *arguments: object, only: Container[str] | None = None) -> None:
        """Keep the facts that a method of each case returns."""
        for name, facts in self.each(lambda case: case.request(method, *arguments), only):
            self.facts[name] |= facts

    def measure(
        self, num_rounds: int, method: str, *arguments: object, only: Container[str] | None = None,
        label: str = "",
    ) -> None:  # fmt: skip
        """Keep the figures that a method of each case returns in each of the rounds."""
        found: dict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for number in range(1, num_rounds + 1):
            log.info(f"{label}round {number} of {num_rounds}")
            for name, figures in self.each(lambda case: case.request(method, *arguments), only):
                for figure, value in figures.items():
                    found[name][figure].append(value)
        for name in self.cases:
            self.rounds[name] |= found[name]

    def median(self, case: str, figure: str) -> float | None:
        """Return the median of a figure over the rounds; None if it was not measured."""
        values = self.rounds[case].get(figure)
        return statistics.median(values) if values else None

    def ratio(self, figure: str, top: str, bottom: str) -> float | None:
        """Return the median over the rounds of one case's figure over another's; None without both."""
        return median_ratio(self.rounds[top].get(figure), self.rounds[bottom].get(figure))

    def report(
        self, settings: Row, names: Iterable[str], ratios: Mapping[str, float | None], notes: Sequence[str]
    ) -> Report:
        """Return `make_report` with a row for each named case: its medians, its facts, why it failed."""
        rows = [
            {
                "case": name,
                **{figure: self.median(name, figure) for figure in self.rounds[name]},
                **self.facts[name],
                "failure": self.failures.get(name),
            }
            for name in names
        ]
        rounds = {name: figures for name, figures in self.rounds.items() if figures}
        return make_report(settings, rows, ratios, notes) | {"rounds": _rounded(rounds)}


def make_report(
    settings: Row, rows: Sequence[Row], ratios: Mapping[str, float | None], notes: Sequence[str]
) -> Report:
    """Return the report of rows and of settings that hold for all; a note says of each None why it is one."""
    said = {note.partition(":")[0] for note in notes}
    unsaid = [name for name, ratio in ratios.items() if ratio is None and name not in said]
    notes = [*(f"{name}: not measured" for name in unsaid), *notes]
    report = {**settings, "rows": rows, "ratios": ratios, "notes": notes}
    return {name: _rounded(value) for name, value in report.items()}


def describe(report: Report) -> list[str]:
    """Return the report as text: its settings, the rows as a table, the ratios, the notes."""
    settings = {name: v for name, v in report.items() if name not in ("rows", "ratios", "notes", "rounds")}
    measured = {name: ratio for name, ratio in report["ratios"].items() if ratio is not None}
    width = max(map(len, measured), default=0)
    return [
        *(f"{name}: {value}" for name, value in settings.items() if value is not None),
        *table_lines(report["rows"]),
        *(f"{name:<{width}}  {ratio}" for name, ratio in measured.items()),
        *report["notes"],
    ]


def table_lines(rows: Sequence[Row]) -> list[str]:
    """Return the lines of a plain table: a column for each key of the rows that has a value somewhere.

    >>> table_lines([{"mode": "ddp", "step_s": 0.5, "failure": None}, {"mode": "none", "step_s": None}])
    ['mode  step_s', 'ddp      0.5', 'none       -']
    """
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if value is not None)
    columns = []
    for key in keys:
        values = [row.get(key) for row in rows]
        cells = [key, *("-" if value is None else f"{value}" for value in values)]
        width, align = max(map(len, cells)), "<" if any(isinstance(value, str) for value in values) else ">"
        columns.append([f"{cell:{align}{width}}" for cell in cells])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def four_digits(value: float) -> float:
    """Round a figure to its significant digits; a small ratio keeps as many as a large rate.

    >>> four_digits(0.00215155), four_digits(1234.56)
    (0.002152, 1235.0)
    """
    return float(f"{value:.4g}")


def _rounded(value: Any) -> Any:
    """Return mappings and lists with each float in four digits."""
    if isinstance(value, float):
        return four_digits(value)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def median_ratio(tops: Sequence[float] | None, bottoms: Sequence[float] | None) -> float | None:
    """Return the median over the rounds of one value over another; None if either was not measured.

    >>> median_ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]), median_ratio([1.0], None)
    (3.0, None)
    """
    if tops is None or bottoms is None:
        return None
    return statistics.median(top / bottom for top, bottom in zip(tops, bottoms, strict=True))


def machine_name(device: str = "cpu") -> str:
    """Return the processor's name, and the GPU's or the number of cores that may be used."""
    if device == "cpu":
        return f"{platform.machine()}, {usable_cores()} cores"
    import torch  # not in every case's process: its memory is measured

    return f"{platform.machine()}, {torch.cuda.get_device_name()}"
