"""One torchrun with its ranks: a process to watch, to kill and to wait for."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from scripts.soak.rank import StepRecord

REPOSITORY = Path(__file__).parent.parent.parent
MODULE = "scripts.soak.rank"
MAX_RESTARTS = 2
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


class Launch:
    """A torchrun of `scripts.soak.rank`.

    Args:
        number: which launch of the run; part of the names of its evidence and its log.
        num_ranks: processes it starts.
        evidence: folder of the evidence.
        log: file for the output of torchrun and the ranks.
        options: of `train.main`.
    """

    def __init__(
        self, number: int, num_ranks: int, evidence: Path, log: Path, options: Sequence[str]
    ) -> None:
        self.number, self.num_ranks, self.evidence, self.log = number, num_ranks, evidence, log
        self.started = time.monotonic()
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}",
            f"--max-restarts={MAX_RESTARTS}", f"--signals-to-handle={SIGNALS}", "-m", MODULE,
            str(evidence), str(number), *options,
        ]  # fmt: skip
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command,
                cwd=log.parent,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        """Whether torchrun is alive."""
        return self.process.poll() is None

    def log_text(self) -> str:
        """The output of torchrun and the ranks so far."""
        return self.log.read_text(errors="replace")

    def progress(self) -> tuple[int, int]:
        """The newest attempt of this launch that has done a step, and its last step; (0, 0) before any."""
        files = sorted(self.evidence.glob(f"{self.number:04d}-*-rank-0-of-*.jsonl"), reverse=True)
        for path in files:
            lines = path.read_bytes().splitlines()
            if lines:
                return int(path.name.split("-")[1]), msgspec.json.decode(lines[-1], type=StepRecord).step
        return 0, 0

    def ranks(self) -> list[int]:
        """Process ids of the ranks that are alive."""
        found = []
        with suppress(OSError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
            for child in children:
                with suppress(OSError):
                    if MODULE.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                        found.append(int(child))
        return found

    def kill(self) -> None:
        """Kill torchrun and every rank by SIGKILL, and wait until they are gone."""
        ranks = self.ranks()
        self.process.kill()
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not any(is_alive(rank) for rank in ranks), 30)

    def end(self) -> int | None:
        """Wait for torchrun. Returns its exit code, negative for a signal; None where it had to be killed."""
        try:
            return self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def resumed_at(self) -> list[int]:
        """The steps at which attempts of this launch resumed, in order; a start from nothing has none."""
        return [int(step) for step in re.findall(r"resuming at step (\d+)", self.log_text())]


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll until a condition holds; False if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
