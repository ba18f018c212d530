"""The harness of all benchmarks: cases in processes of their own, interleaved rounds, ratios, tables.

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
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from subprocess import PIPE, Popen
from typing import Any, Generic, TypeVar

from data_pipeline.common.machine import usable_cores
from data_pipeline.common.start import own_command

Report = dict[str, Any]
"""The object that `--json` prints."""
Ratios = dict[str, float | None]
K = TypeVar("K")
T = TypeVar("T")
log = logging.getLogger("train")


class CaseError(RuntimeError):
    """A case that failed, or took longer than it may, all its answers together; its process has ended."""


class Case:
    """One thing to measure, built and measured in a process of its own.

    Args:
        stack: ends the process.
        make: builds it; gets a stack that the process closes at its end, and `arguments`.
        limit_s: seconds for building it and for all requests together; None for as long as they take.
        build_limit_s: seconds for building it, which then do not count among those; None if they do.
        build: False leaves it to `build`: cases that are made first and built later import side by side.
    Raises:
        CaseError: it failed, or the time is over.
    """

    def __init__(
        self,
        stack: ExitStack,
        make: Callable[..., object],
        *arguments: object,
        limit_s: float | None = None,
        build_limit_s: float | None = None,
        build: bool = True,
    ) -> None:
        self.name, self._limit_s, self._used_s = " ".join(map(str, arguments[:1])), limit_s, 0.0
        self._build_limit_s = build_limit_s
        # A plain interpreter: multiprocessing would change how torch's DataLoader starts its workers.
        command = own_command("train.bench.harness:serve")
        process = stack.enter_context(Popen(command, stdin=PIPE, stdout=PIPE))
        assert process.stdin is not None and process.stdout is not None
        self._process, self._arguments = process, arguments
        self._requests, self._replies = process.stdin, process.stdout
        pickle.dump(sys.path, self._requests)  # it imports what this process would
        pickle.dump(make, self._requests)
        self._requests.flush()
        if build:
            self.build()

    def build(self) -> None:
        """Build what is measured, in its process."""
        if self._build_limit_s is None:
            self.request(*self._arguments)
            return
        limit_s, self._limit_s = self._limit_s, self._build_limit_s
        self.request(*self._arguments)
        self._limit_s, self._used_s = limit_s, 0.0

    def request(self, *method_and_arguments: object) -> Any:
        """Call a method of the case, by its name, in its process, and wait for what it returns."""
        started = time.perf_counter()
        left_s = None if self._limit_s is None else max(0.0, self._limit_s - self._used_s)
        try:
            pickle.dump(method_and_arguments, self._requests)
            self._requests.flush()
            if not select.select([self._replies], [], [], left_s)[0]:
                self._process.kill()
                raise CaseError(f"{self.name}: cut off after {self._limit_s:g} s")
            self._used_s += time.perf_counter() - started
            reply = pickle.load(self._replies)
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            raise CaseError(f"{self.name}: its process ended with code {code}") from None
        if isinstance(reply, CaseError):
            self._process.kill()  # what it holds on a device is free at once, whatever state that is in
            raise CaseError(f"{self.name}: {reply}")
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


class Turns(Generic[K]):
    """Cases that are measured in turns; one that fails is left out, and the others go on.

    Attributes:
        failures: why those that were left out failed.
    """

    def __init__(self, cases: Mapping[K, Case]) -> None:
        self.failures: dict[K, str] = {}
        self._cases = dict(cases)

    def each(self, work: Callable[[Case], T], only: Container[K] | None = None) -> Iterator[tuple[K, T]]:
        """Do some work with each case, or with some of them alone; yield its key and the result."""
        for key, case in list(self._cases.items()):
            if only is None or key in only:
                try:
                    yield key, work(case)
                except CaseError as error:
                    del self._cases[key]
                    self.failures[key] = str(error).removeprefix(f"{key}: ")
                    log.warning(str(error))

    def ask(self, *request: object, only: Container[K] | None = None) -> Iterator[tuple[K, Any]]:
        """Yield each case's key, and its reply to a request."""
        return self.each(lambda case: case.request(*request), only)


def _itself(_stack: ExitStack, function: Callable[..., object]) -> Callable[..., object]:
    return function


def run_alone(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a fresh process, whose memory is then the function's alone."""
    with ExitStack() as stack:
        return Case(stack, _itself, function).request("__call__", *arguments)


def rounds(count: int, prefix: str = "") -> Iterator[int]:
    """Yield the numbers from 1 to `count`, and log each before its round is measured."""
    for number in range(1, count + 1):
        log.info(f"{prefix}round {number} of {count}")
        yield number


def time_calls(
    work: Callable[[], object], count: int = 1, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Return seconds for each of `count` calls; `clock` may wait until a device has finished its work."""
    seconds = []
    for _ in range(count):
        started = clock()
        work()
        seconds.append(clock() - started)
    return seconds


def four_digits(value: float) -> float:
    """Round a figure to its significant digits; a small ratio keeps as many as a large rate.

    >>> four_digits(0.00215155), four_digits(1234.56)
    (0.002152, 1235.0)
    """
    return float(f"{value:.4g}")


def rate(values: Sequence[float]) -> dict[str, Any]:
    """Return the median of the rounds' images per second, and each of them."""
    return {
        "images_per_s": four_digits(statistics.median(values)),
        "rounds": [four_digits(value) for value in values],
    }


def median_ratio(tops: Sequence[float] | None, bottoms: Sequence[float] | None) -> float | None:
    """Return the median over the rounds of one value over another; None if either was not measured.

    >>> median_ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]), median_ratio([1.0], None)
    (3.0, None)
    """
    if tops is None or bottoms is None:
        return None
    return statistics.median(top / bottom for top, bottom in zip(tops, bottoms, strict=True))


def round_ratios(
    ratios: Ratios, reason: str = "not measured", others: Mapping[str, str] | None = None
) -> tuple[Ratios, list[str]]:
    """Return the ratios in four digits, and for each None a note: `reason`, or its own in `others`."""
    notes = [f"{name}: {(others or {}).get(name, reason)}" for name, value in ratios.items() if value is None]
    return {name: None if value is None else four_digits(value) for name, value in ratios.items()}, notes


def ratio_lines(ratios: Mapping[str, float | None], width: int = 30, digits: int = 2) -> list[str]:
    """Return a line for each ratio."""
    texts = {k: "not measured" if ratio is None else f"{ratio:.{digits}f}" for k, ratio in ratios.items()}
    return [f"{name:<{width}} {text}" for name, text in texts.items()]


def table_lines(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a plain table.

    Args:
        columns: heading and format of the cells, alignment and width first: `("step s", ">9.3f")`.
        rows: cells; a None is shown as `-`.

    >>> table_lines([("mode", "<6"), ("step s", ">8.2f")], [("ddp", 0.5), ("none", None)])
    ['mode    step s', 'ddp       0.50', 'none         -']
    """
    specs = [spec for _, spec in columns]
    widths = [spec.split(".")[0] for spec in specs]
    lines = ["".join(f"{heading:{width}}" for (heading, _), width in zip(columns, widths, strict=True))]
    for row in rows:
        cells = zip(row, specs, widths, strict=True)
        lines.append("".join(f"{'-':{w}}" if cell is None else f"{cell:{spec}}" for cell, spec, w in cells))
    return lines


def machine_name(device: str = "cpu") -> str:
    """Return the processor's name, and the GPU's or the number of cores that may be used."""
    if device == "cpu":
        return f"{platform.machine()}, {usable_cores()} cores"
    import torch  # not in every case's process: its memory is measured

    return f"{platform.machine()}, {torch.cuda.get_device_name()}"
