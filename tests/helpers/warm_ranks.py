"""Ranks, and torchrun with its ranks, without a cold start: forked from a process that has torch imported."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

import msgspec
from torch._C._distributed_c10d import TCPStore

from tests.helpers.thin_networks import are_thin, stay_thin

THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
PATIENCE_S = 30.0
"""Ranks that have not exited so long after another one failed are killed, as torchrun does."""

_START = threading.Lock()


def warm_context() -> multiprocessing.context.ForkServerContext:
    """How warm processes are started, with the process running that they are forked from."""
    with _START:
        _start_server()
    return multiprocessing.get_context("forkserver")


@cache
def _start_server() -> None:
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", "tests.helpers.prepared"])
    with mock.patch.dict(os.environ, THREADS):
        forkserver.ensure_running()


class Ranks:
    """Running ranks of `python -m MODULE ARGUMENTS`; they meet at this process's store, as at torchrun's.

    Args:
        arguments: the module and what follows it on the command line.
        cwd: where they run; their output goes to files there.
        in_world: whether they are ranks; torchrun is not.
        environment: more variables for them; they have those with which the first one here was started.
    """

    def __init__(
        self,
        num_ranks: int,
        arguments: Sequence[str | Path],
        cwd: Path,
        *,
        in_world: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.arguments = list(map(str, arguments))
        self._output = [cwd / f"{name}-{time.monotonic_ns()}.txt" for name in ("stdout", "stderr")]
        self.store: TCPStore | None = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = THREADS | dict(environment or {})
        if in_world:
            shared |= {
                "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
            }  # fmt: skip
        context = warm_context()
        self.processes = [
            context.Process(
                target=_be_rank,
                args=(
                    self.arguments,
                    cwd,
                    shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if in_world else {}),
                    self._output,
                    are_thin(),
                ),
            )
            for rank in range(num_ranks)
        ]
        for process in self.processes:
            process.start()

    @property
    def stderr(self) -> str:
        """Their stderr so far."""
        return self._output[1].read_text() if self._output[1].exists() else ""

    def wait(self, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
        """Wait for their end. The code is that of the first rank that failed, which ends the others."""
        end, code, running = time.monotonic() + timeout_s, 0, list(self.processes)
        while running:
            if not connection.wait([process.sentinel for process in running], end - time.monotonic()):
                self.kill()
                raise subprocess.TimeoutExpired(self.arguments, timeout_s, stderr=self.stderr.encode())
            ended = [process for process in running if process.exitcode is not None]
            running = [process for process in running if process not in ended]
            for process in ended:
                if process.exitcode and not code:
                    code, end = process.exitcode, min(end, time.monotonic() + PATIENCE_S)
                    for other in running:
                        other.terminate()
        return subprocess.CompletedProcess(self.arguments, code, self._output[0].read_text(), self.stderr)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 120) -> bool:
        """Wait until a condition holds. Returns False if a rank exited first."""
        end = time.monotonic() + timeout_s
        while not condition():
            if not all(process.is_alive() for process in self.processes):
                return False
            assert time.monotonic() < end, self.stderr
            time.sleep(0.01)
        return True

    def send(self, number: signal.Signals, *, rank: int) -> None:
        """Send one of them a signal."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def kill(self) -> None:
        """End them all at once."""
        for process in self.processes:
            process.kill()
            process.join()


def _be_rank(
    arguments: list[str], cwd: Path, environment: dict[str, str], output: list[Path], thin: bool
) -> None:
    os.environ.update(environment)
    if thin:
        stay_thin()
    os.chdir(cwd)
    for number, path in enumerate(output, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def run_ranks(
    num_ranks: int, arguments: Sequence[str | Path], cwd: Path, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run a module of ours on so many ranks to its end."""
    with ranks_of(num_ranks, arguments, cwd) as ranks:
        return ranks.wait(timeout_s)


def run_warm(
    arguments: Sequence[str | Path], cwd: Path, timeout_s: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run torchrun, the soak or a module of ours to its end; torchrun's ranks are warm, too."""
    with warm_process(arguments, cwd, **environment) as process:
        return process.wait(timeout_s)


def warm_process(
    arguments: Sequence[str | Path], cwd: Path, **environment: str
) -> AbstractContextManager[Ranks]:
    """Torchrun, the soak or a module of ours, which does not outlive a test; its one process is no rank."""
    command = ["tests.helpers.forked", *arguments]
    return ranks_of(1, command, cwd, in_world=False, environment=environment)


@contextmanager
def ranks_of(
    num_ranks: int,
    arguments: Sequence[str | Path],
    cwd: Path,
    *,
    in_world: bool = True,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Ranks]:
    """Ranks that do not outlive a test."""
    ranks = Ranks(num_ranks, arguments, cwd, in_world=in_world, environment=environment)
    try:
        yield ranks
    finally:
        ranks.kill()


def train_warm(
    num_ranks: int,
    *,
    data: Path,
    out: Path,
    overrides: Sequence[str] = (),
    options: Sequence[str] = (),
    module: Sequence[str | Path] = ("train.main",),
) -> Path:
    """Train and return the run's folder; if it fails, the test fails with their stderr.

    Args:
        module: `train.main`, or one that wraps it, with the arguments before its options.
    """
    sets = [f"--set={o}" for o in overrides]
    out.parent.mkdir(parents=True, exist_ok=True)
    done = run_ranks(num_ranks, [*module, f"--data={data}", f"--out={out}", *sets, *options], cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return Path(msgspec.json.decode(done.stdout)["run"])
