"""Runs the trainer for a study, and keeps what came of it: a line of JSON for each run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

ROOT = Path(__file__).parents[2]
SOURCE = "SOURCE"
"""Stands in a setting for the run to begin with, whose place is another on each machine."""


class Setting(msgspec.Struct, frozen=True):
    """One setting to compare.

    Attributes:
        sets: what it changes in the study's recipe, each `key=value`.
        ranks: processes that train.
    """

    sets: tuple[str, ...]
    ranks: int = 1


class Epoch(msgspec.Struct, frozen=True):
    """Validation after one epoch: mean loss, and fractions of the held-out images."""

    epoch: int
    loss: float
    top1: float
    top5: float


class Run(msgspec.Struct, frozen=True):
    """One run, a line of the study's file.

    Attributes:
        epochs: the epochs that it finished.
        ended: the error that ended it early; empty where it finished.
        seconds: with its start.
    """

    setting: Setting
    seed: int
    epochs: list[Epoch]
    ended: str
    seconds: float


def train_source(recipe: str, data: Path, runs: Path, overrides: Sequence[str]) -> Path:
    """Train the run that others begin with, or resume it; a finished one is used as it is.

    Args:
        recipe: whose name the trainer knows.
        data: the folder.
        runs: the folder of the run.
    Returns:
        The run.
    """
    arguments = ["--recipe", recipe, "--data", str(data), "--out", str(runs), "--resume", "auto"]
    _run_trainer(1, arguments, overrides).check_returncode()
    return max(runs.iterdir())


def _run_trainer(
    ranks: int, arguments: Sequence[str], overrides: Sequence[str], capture_output: bool = False
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alexnet", "train", "--nproc", str(ranks), *arguments]
    command += [f"--set={text}" for text in overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=capture_output, text=True)


def train(
    recipe: str, data: Path | None, setting: Setting, seed: int, overrides: Sequence[str], source: Path | None
) -> Run:
    """Run the trainer itself.

    Args:
        recipe: whose name the trainer knows.
        data: the folder; None for the recipe's own.
        overrides: of the whole study; the setting's go above them.
        source: the run that `SOURCE` stands for in the setting.
    Raises:
        RuntimeError: the run failed, and not because its loss was flat.
    """
    given = [] if data is None else ["--data", str(data)]
    own = [text.replace(SOURCE, json.dumps(str(source))) for text in setting.sets]
    with tempfile.TemporaryDirectory() as out:
        started = time.monotonic()
        arguments = ["--resume", "none", "--recipe", recipe, *given, "--out", out]
        done = _run_trainer(setting.ranks, arguments, [f"seed={seed}", *overrides, *own], capture_output=True)
        ended = next((line for line in done.stderr.splitlines() if line.startswith("error: ")), "")
        if done.returncode != 0 and "ln(" not in ended:
            raise RuntimeError(f"{setting}, seed {seed}: {done.stderr[-2000:]}")
        (metrics,) = Path(out).glob("*/metrics.jsonl")
        rows = [msgspec.json.decode(line) for line in metrics.read_bytes().splitlines()]
        return Run(
            setting=setting,
            seed=seed,
            epochs=[msgspec.convert(row, Epoch) for row in rows if row["split"] == "val"],
            ended=ended.removeprefix("error: ").partition(". ")[0],  # the rest names folders
            seconds=round(time.monotonic() - started, 1),
        )


def read_runs(path: Path) -> list[Run]:
    """Read the runs made so far; none where there is no file."""
    return msgspec.json.Decoder(Run).decode_lines(path.read_bytes()) if path.exists() else []
