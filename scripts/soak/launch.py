"""One torchrun with its ranks, to watch, to kill and to wait for, and the small disk that it writes to."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import msgspec

from data_pipeline.datasets.image_folder import load_image_folder
from scripts.soak.evidence import Evidence, read_evidence
from scripts.soak.plan import SETTINGS, STEPS_PER_EPOCH
from scripts.soak.rank import StepRecord
from train.distributed.torchrun import SIGNALS

REPOSITORY = Path(__file__).parent.parent.parent
MODULE = "scripts.soak.rank"
MAX_RESTARTS = 2
DISK_MB = 256
"""Room for the checkpoints, 18 MB each: two kept, the best one, one in writing, and some to spare."""


@dataclass(frozen=True)
class RunSpec:
    """A run to make; the same one with faults and without.

    Attributes:
        seed, epochs: of the run.
        folder: for its logs, evidence, data and checkpoints.
    """

    seed: int
    epochs: int
    folder: Path

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.epochs * STEPS_PER_EPOCH

    @property
    def disk(self) -> Path:
        """The folder on which a small file system can be mounted."""
        return self.folder / "disk"

    @property
    def runs(self) -> Path:
        """The folder that `--out` names."""
        return self.disk / "runs"

    @property
    def run(self) -> Path:
        """The newest run's folder; a launch killed before its first checkpoint may have left another."""
        return max(path for path in self.runs.iterdir() if path.is_dir())

    def image(self, index: int) -> Path:
        """The file of a training image, in the run's own copy of the data."""
        return load_image_folder(self.folder / "data", "train").path_at(index)

    def evidence(self) -> Evidence:
        """The records of the run so far."""
        return read_evidence(self.folder / "evidence", self.total_steps)

    def prepare(self, demo: Path) -> None:
        """Make the folders, with a copy of the data: hard links, which are replaced and never written to."""
        shutil.copytree(demo, self.folder / "data", copy_function=os.link)
        (self.folder / "evidence").mkdir()


class Launch(AbstractContextManager["Launch"]):
    """A torchrun of `scripts.soak.rank`, which starts or resumes a run; killed at the end of the context.

    Args:
        spec: the run.
        number: which launch of the run; part of the names of its evidence and its log.
        num_ranks: processes it starts.
    """

    def __init__(self, spec: RunSpec, number: int, num_ranks: int) -> None:
        self.spec, self.number, self.num_ranks = spec, number, num_ranks
        self.log = spec.folder / f"launch-{number:04d}.log"
        sets = [f"--set={s}" for s in (*SETTINGS, f"seed={spec.seed}", f"epochs={spec.epochs}")]
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}",
            f"--max-restarts={MAX_RESTARTS}", f"--signals-to-handle={SIGNALS}", "-m", MODULE,
            str(spec.folder / "evidence"), str(number),
            f"--data={spec.folder / 'data'}", f"--out={spec.runs}", "--resume=auto", *sets,
        ]  # fmt: skip
        with self.log.open("wb") as file:
            self.process = Popen(
                command,
                cwd=spec.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __exit__(self, *error: object) -> None:
        self.kill()

    @property
    def running(self) -> bool:
        """Whether torchrun is alive."""
        return self.process.poll() is None

    def log_text(self) -> str:
        """The output of torchrun and the ranks so far."""
        return self.log.read_text(errors="replace")

    def progress(self) -> tuple[int, int]:
        """The newest attempt of this launch that has done a step, and its last step; (0, 0) before any."""
        files = (self.spec.folder / "evidence").glob(f"{self.number:04d}-*-rank-0-of-*.jsonl")
        for path in sorted(files, reverse=True):
            lines = path.read_bytes().splitlines()
            if lines:
                return int(path.name.split("-")[1]), msgspec.json.decode(lines[-1], type=StepRecord).step
        return 0, 0

    def ranks(self) -> list[int]:
        """Process ids of the ranks that are alive: torchrun starts nothing else."""
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except OSError:  # it has ended
            return []
        return [int(child) for child in children if is_alive(int(child))]

    def kill(self) -> None:
        """Kill torchrun and every rank by SIGKILL, and wait until they are gone."""
        ranks = self.ranks()
        self.process.kill()
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        self.process.wait()
        wait_until(lambda: not any(is_alive(rank) for rank in ranks), 30)

    def ends_well(self) -> bool:
        """Wait for torchrun; whether its exit code is 0. One that does not end is killed with the context."""
        try:
            return self.process.wait(timeout=120) == 0
        except subprocess.TimeoutExpired:
            return False


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


@contextmanager
def filled(disk: Path) -> Iterator[int]:
    """Fill a file system to the last byte for as long as the context lasts. Yields the number of bytes."""
    assert disk.is_mount(), "only a small disk of ours is filled"
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            block = bytes(size)
            with suppress(OSError):
                while True:
                    file.write(block)
    yield filler.stat().st_size
    filler.unlink()


@contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """Mount a small tmpfs on a folder for as long as the context lasts.

    Yields:
        Nothing; or, where mounting is not allowed, the reason in one line. The folder serves either way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "soak", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        yield f"mounting a small file system failed: {mounted.stderr.strip()}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
