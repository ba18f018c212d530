"""Cases of benchmarks without Python's cold start: processes of their own, forked from one that has torch."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO
from unittest import mock

from tests.helpers.forked import run_script
from tests.helpers.thin_networks import are_thin, stay_thin
from tests.helpers.warm_ranks import warm_context


class WarmPopen:
    """A process of `python SCRIPT ARGUMENTS` with what `subprocess.Popen` has: pipes, and its end.

    It builds thin networks if this process does, and keeps to one core: of more threads, beside other
    processes, torch's spin half of their time.
    """

    def __init__(
        self, command: Sequence[str], *, stdin: int | None = None, stdout: int | None = None
    ) -> None:
        interpreter, *arguments = command
        assert interpreter == sys.executable
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        theirs = []  # connections, since a process that is started gets copies of these
        for number, given in enumerate((stdin, stdout, None)):
            if given != subprocess.PIPE:
                theirs.append(Connection(os.dup(number if given is None else given)))
                continue
            read, write = os.pipe()
            theirs.append(Connection(write if number else read))
            if number:
                self.stdout = os.fdopen(read, "rb")
            else:
                self.stdin = os.fdopen(write, "wb")
        self._process = warm_context().Process(
            target=_be_python, args=(arguments, Path.cwd(), dict(os.environ), theirs, are_thin())
        )
        self._process.start()
        for descriptor in theirs:
            descriptor.close()

    def __enter__(self) -> WarmPopen:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdout, self.stdin):
            if stream is not None:
                stream.close()
        self.wait()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for its end. Returns its code."""
        self._process.join(timeout)
        return self._process.exitcode


def _be_python(
    arguments: list[str], cwd: Path, environment: dict[str, str], streams: list[Connection], thin: bool
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, [cores[os.getpid() % len(cores)]])
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for as long as it lives
    os.environ.clear()
    os.environ.update(environment)
    if thin:
        stay_thin()
    os.chdir(cwd)
    multiprocessing.set_start_method(None, force=True)  # as a plain interpreter has it
    run_script(arguments)


@contextmanager
def warm_bench_cases() -> Iterator[None]:
    """Start the cases of benchmarks warm until the end of the context; all else of the harness is real."""
    with mock.patch("train.bench.harness.Popen", WarmPopen):
        yield
