"""What a person sees on stderr: log lines, and the progress of long work.

A bar on a terminal, plain lines everywhere else. stdout is left to results.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from data_pipeline.common.text import visible

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 5.0
LOGGERS = ("train", "infer", "data_pipeline")


class Progress(Protocol):
    """Work under way."""

    def advance(self, count: int, note: str = "") -> None:
        """So much more is done; a `note` replaces the text behind the bar."""


@lru_cache(maxsize=1)
def stderr_console() -> Console:
    """The one console for stderr, so that log lines appear above a bar and not through it."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


class _ConsoleHandler(logging.Handler):
    """Log lines above the bar on a terminal, plain lines elsewhere."""

    def emit(self, record: logging.LogRecord) -> None:
        text = visible(self.format(record))
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if sys.stderr.isatty():
            stderr_console().print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)  # noqa: T201


def set_up_logging(*, quiet: bool = False) -> None:
    """Send this project's log lines to stderr; called once, by a command.

    Args:
        quiet: only warnings and errors, for the ranks other than 0.
    """
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [_ConsoleHandler()]
        logger.propagate = False
        logger.setLevel(logging.WARNING if quiet else logging.INFO)


class _Lines:
    """For logs and pipes: a line now and then, and one at the end."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total, self.done, self.note = title, total, 0, ""
        self.started = self.last = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        self.done, self.note = self.done + count, note or self.note
        if time.monotonic() - self.last >= SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            self.print()

    def print(self) -> None:
        of = "" if self.total is None else f"/{self.total}"
        note = f", {self.note}" if self.note else ""
        seconds = time.monotonic() - self.started
        print(f"{self.title}: {self.done}{of}{note} [{seconds:.0f} s]", file=sys.stderr, flush=True)  # noqa: T201


class _Silent:
    def advance(self, count: int, note: str = "") -> None:
        pass


@contextmanager
def show_progress(title: str, total: int | None, *, shown: bool = True) -> Iterator[Progress]:
    """Report how far some work has come, on stderr.

    Args:
        title: what is being done.
        total: how many units there are; None where that is not known.
        shown: False says nothing, for the ranks other than 0.
    """
    if not shown:
        yield _Silent()
    elif not sys.stderr.isatty():
        lines = _Lines(title, total)
        yield lines
        lines.print()
    else:
        with _bar(title, total) as bar:
            yield bar


@contextmanager
def _bar(title: str, total: int | None) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
    )
    with RichProgress(*columns, console=stderr_console(), transient=True) as bar:
        task = bar.add_task(title, total=total, note="")

        class _Bar:
            def advance(self, count: int, note: str = "") -> None:
                fields = {"note": note} if note else {}
                bar.update(task, advance=count, **fields)  # type: ignore[arg-type]

        yield _Bar()
