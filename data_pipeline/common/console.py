"""Shows log lines, and the progress of long work, on stderr.

Progress is a bar on a terminal, and plain lines elsewhere. stdout is left to results.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from data_pipeline.common.streams import raise_broken_pipe
from data_pipeline.common.text import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 5.0
LOGGERS = ("train", "infer", "data_pipeline")


class Progress:
    """Receives the progress of some work. This one shows nothing."""

    def advance(self, count: int, note: str = "") -> None:
        """Report `count` more units as done; a `note` replaces the text behind the bar."""


def make_console(**options: Any) -> Console:
    """A console that raises BrokenPipeError where its reader went away; that of rich ends the process."""
    from rich.console import Console

    class PipeConsole(Console):
        def on_broken_pipe(self) -> None:
            raise_broken_pipe()

    return PipeConsole(**options)


@lru_cache(maxsize=1)
def stderr_console() -> Console:
    """The one console for stderr, so that rich prints log lines above a bar and not through it."""
    return make_console(stderr=True, highlight=False)


class _ConsoleHandler(logging.Handler):
    """Prints log lines above the bar on a terminal, plain lines elsewhere."""

    def emit(self, record: logging.LogRecord) -> None:
        text = visible(self.format(record))
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if sys.stderr.isatty():
            stderr_console().print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)  # noqa: T201


def set_up_logging(*, quiet: bool = False) -> None:
    """Send this project's log lines to stderr. A command calls it, once.

    Args:
        quiet: only warnings and errors, for the ranks other than 0.
    """
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [_ConsoleHandler()]
        logger.propagate = False
        logger.setLevel(logging.WARNING if quiet else logging.INFO)


class _Lines(Progress):
    """Progress in logs and pipes: a line every few seconds, and one at the end."""

    def __init__(self, title: str, total: int | None) -> None:
        self._title, self._of = title, "" if total is None else f"/{total}"
        self._done, self._note = 0, ""
        self._started = self._last = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        self._done, self._note = self._done + count, note or self._note
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self.print()

    def print(self) -> None:
        note = f", {self._note}" if self._note else ""
        seconds = f"[{time.monotonic() - self._started:.0f} s]"
        print(f"{self._title}: {self._done}{self._of}{note} {seconds}", file=sys.stderr, flush=True)  # noqa: T201


class _Bar(Progress):
    """Progress on a terminal."""

    def __init__(self, bar: RichProgress, title: str, total: int | None) -> None:
        self._bar, self._task = bar, bar.add_task(title, total=total, note="")

    def advance(self, count: int, note: str = "") -> None:
        self._bar.update(self._task, advance=count)
        if note:
            self._bar.update(self._task, note=note)


@contextmanager
def show_progress(title: str, total: int | None, *, shown: bool = True) -> Iterator[Progress]:
    """Show the progress of some work on stderr.

    Args:
        title: the work.
        total: how many units there are; None where that is not known.
        shown: False shows nothing, for the ranks other than 0.
    """
    if not shown:
        yield Progress()
    elif not sys.stderr.isatty():
        lines = _Lines(title, total)
        yield lines
        lines.print()
    else:
        from rich import progress as rich

        columns = (
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[note]}", markup=False),
            rich.TimeElapsedColumn(),
        )
        with rich.Progress(*columns, console=stderr_console(), transient=True) as bar:
            yield _Bar(bar, title, total)
