"""Scripts without Python's cold start: processes of their own, forked from one that has torch imported."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any
from unittest import mock

from tests.helpers.thin_networks import are_thin, stay_thin
from tests.helpers.warm_ranks import warm_context


class WarmPopen:
    """A process of `python SCRIPT ARGUMENTS` with what `subprocess.Popen` has: pipes, and its end.

    It builds thin networks if this process does.

    Args:
        pinned: to one core: of more threads, with other processes beside them, torch's spin half of their time.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        stdin: int | IO[Any] | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        pinned: bool = False,
    ) -> None:
        interpreter, *arguments = map(str, command)
        assert interpreter == sys.executable
        self.stdin: IO[bytes] | None = None
        self.stdout: IO[bytes] | None = None
        theirs = []  # connections, since a process that is started gets copies of these
        for number, given in enumerate((stdin, stdout, stderr)):
            if given != subprocess.PIPE:
                own = number if given is None else given if isinstance(given, int) else given.fileno()
                theirs.append(Connection(os.dup(own)))
                continue
            read, write = os.pipe()
            theirs.append(Connection(write if number else read))
            if number:
                self.stdout = os.fdopen(read, "rb")
            else:
                self.stdin = os.fdopen(write, "wb")
        environment = dict(os.environ if env is None else env)
        self._process = warm_context().Process(
            target=_be_python,
            args=(arguments, str(cwd or Path.cwd()), environment, theirs, are_thin(), pinned),
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
    arguments: list[str], cwd: str, environment: dict[str, str], streams: list[Connection], thin: bool,
    pinned: bool,
) -> None:  # fmt: skip
    if pinned:
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
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]  # as a plain interpreter has it
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")


def run_warm(
    command: Sequence[str | Path], cwd: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script to its end."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        with WarmPopen(command, stdout=stdout, stderr=stderr, cwd=cwd, env=env) as process:
            code = process.wait()
        assert code is not None
        for file in (stdout, stderr):
            file.seek(0)
        return subprocess.CompletedProcess(list(command), code, stdout.read(), stderr.read())


@contextmanager
def warm_bench_cases() -> Iterator[None]:
    """Start the cases of benchmarks warm until the end of the context; all else of the harness is as it is."""
    with mock.patch("train.bench.harness.Popen", partial(WarmPopen, pinned=True)):
        yield
