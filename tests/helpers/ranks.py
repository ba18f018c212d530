"""Run commands as a user does: real torchrun, real command line, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

REPOSITORY = Path(__file__).parents[2]

# A small AlexNet on small crops, in float32, without dropout: it learns something in a few steps.
TINY = (
    "preprocessing.resize_px=22",
    "preprocessing.crop_px=22",
    "model.stem_stride=1",
    "model.hidden_units=64",
    "model.dropout=0.0",
    "device=cpu",
    "precision=fp32",
    "log_every=1",
    "cpu_threads=1",
)

COLD = (*TINY, "data.backend=pillow")
"""For ranks that start cold and are not about decoding: DALI and Numba are a quarter of what they import."""


def run_command(
    arguments: Sequence[str | Path], cwd: Path, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run `alexnet` or any module of ours, from a folder of the test's."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COV_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def torchrun_arguments(
    num_ranks: int,
    arguments: Sequence[str | Path],
    *,
    faults: Sequence[dict[str, Any]] = (),
    max_restarts: int = 0,
) -> list[str]:
    """`torchrun … -m train.main …` for `run_warm`; with faults, those of `tests.helpers.faulty_rank`."""
    module = ["tests.helpers.faulty_rank", msgspec.json.encode(faults).decode()] if faults else ["train.main"]
    return [
        "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}",
        f"--max-restarts={max_restarts}", "-m", *module, *map(str, arguments),
    ]  # fmt: skip


def train_ranks(
    num_ranks: int, *, data: Path, out: Path, overrides: Sequence[str] = (), options: Sequence[str] = ()
) -> Path:
    """Train under torchrun and return the run's folder; if it fails, the test fails with its stderr."""
    sets = [f"--set={o}" for o in overrides]
    done = run_command(
        torchrun_arguments(num_ranks, [f"--data={data}", f"--out={out}", *sets, *options]), cwd=out.parent
    )
    assert done.returncode == 0, done.stderr
    return Path(msgspec.json.decode(done.stdout)["run"])


def read_rows(run: Path, split: str) -> list[dict[str, Any]]:
    """The rows of one split in a run's `metrics.jsonl`."""
    rows = [msgspec.json.decode(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    return [row for row in rows if row["split"] == split]


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without the fields that depend on the time."""
    return [{k: v for k, v in row.items() if k not in ("time", "images_per_s")} for row in rows]


def link_subset(source: Path, target: Path, *, num_train: int, num_val: int) -> Path:
    """An ImageFolder of symbolic links to the first images of each class, in turn."""
    for split, count in (("train", num_train), ("val", num_val)):
        by_class = [sorted(folder.iterdir()) for folder in sorted((source / split).iterdir())]
        for number in range(count):
            image = by_class[number % 10][number // 10]
            link = target / split / image.parent.name / image.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image)
    return target
