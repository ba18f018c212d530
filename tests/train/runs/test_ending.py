"""Runs that end before their last epoch, and go on: patience and the limit of time."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from scripts.soak.compare import compare_runs, equal_trees
from tests.helpers.images import write_folder
from tests.helpers.ranks import TINY, comparable, read_rows
from train.checkpoints.load import find_checkpoint, load_checkpoint
from train.config.load import make_config
from train.distributed.world import open_world
from train.loop import run_epochs
from train.runs.ending import LAST_EPOCH, epochs_without_better, why_over
from train.setup import build_run

pytestmark = pytest.mark.usefixtures("thin")

SETTINGS = (
    *TINY, "model.dropout=0.5", "epochs=5", "global_batch=4", "schedule.kind=constant",
    "schedule.warmup_epochs=0", "data.backend=pillow", "data.cache=none",
)  # fmt: skip
STEPS = 3
"""Of an epoch."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ending")
    write_folder(root, {"train/a": 6, "train/b": 6, "val/a": 3, "val/b": 3}, side=24)
    return root


def train(data: Path, out: Path, settings: Sequence[str], resume: str = "none") -> Path:
    """On one rank, in this process."""
    with ExitStack() as stack:
        world = stack.enter_context(open_world("cpu"))
        run_epochs(build_run(make_config("demo", [*SETTINGS, *settings], data), out, resume, world, stack))
    (run,) = out.iterdir()
    return run


def test_patience_counts_epochs_since_the_best_top1() -> None:
    assert [epochs_without_better(e) for e in ([], [0.5], [0.5, 0.4], [0.4, 0.5, 0.4])] == [0, 0, 0, 2]


def over(epochs: float, *val_errors: float, patience: int = 2) -> str | None:
    config = make_config("demo", [f"stop_patience={patience}", "epochs=9"])
    return why_over(config, epochs=epochs, val_errors=val_errors, seconds=None)


def test_patience_ends_a_run_where_an_epoch_ends() -> None:
    assert over(3, 0.25, 0.5, 0.25) == (
        "no better top-1 for 2 epoch(s) after 75.00% of epoch 1 (stop_patience): training ends after 3 of 9 "
        "epochs"
    )
    # Inside an epoch a run that was resumed with less patience goes on to its end.
    assert over(3.5, 0.25, 0.5, 0.25) is None
    assert over(3, 0.25, 0.5, 0.2) is None
    assert over(3, 0.25, 0.5, 0.25, patience=0) is None
    assert over(9, 0.25, 0.5, 0.25) == LAST_EPOCH


@pytest.mark.slow
def test_patience_ends_a_run_the_same_after_a_resume(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rate is so low that no epoch is better than the first."""
    settings = ("schedule.learning_rate=1e-12", "stop_patience=2")
    with caplog.at_level(logging.INFO, "train"):
        run = train(data, tmp_path, settings)
    (said,) = (m for m in caplog.messages if "stop_patience" in m)
    assert said.endswith("of epoch 1 (stop_patience): training ends after 3 of 5 epochs")
    rows = comparable(read_rows(run, "val"))
    assert [(row["step"], "report" in row) for row in rows] == [(3, False), (6, False), (9, True)]
    table = (run / "classes.csv").read_bytes()
    (run / "classes.csv").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000009")
    train(data, tmp_path, settings, "auto")
    assert comparable(read_rows(run, "val")) == rows and (run / "classes.csv").read_bytes() == table
    caplog.clear()
    with caplog.at_level(logging.INFO, "train"):
        train(data, tmp_path, settings, "auto")
    assert f"nothing to do: this run is finished, at step 9: {said}" in caplog.messages
    train(data, tmp_path, (*settings, "stop_patience=3"), "auto")
    assert [row["step"] for row in read_rows(run, "val")] == [3, 6, 9, 12]


@pytest.mark.slow
def test_time_ends_a_run_which_goes_on_with_more(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The ranks ask each other after the first step, which is inside an epoch: its metrics are not one's."""
    common = ("schedule.kind=plateau", "schedule.patience=1", "epochs=2", "log_every=2")
    whole = train(data, tmp_path / "whole", common)
    with caplog.at_level(logging.INFO, "train"):
        run = train(data, tmp_path / "runs", (*common, "max_hours=1e-9"))
    (said,) = (m for m in caplog.messages if "max_hours is" in m)
    assert said.endswith(
        "hour(s) of training (max_hours is 1e-09): training ends after 0.333 of 2 epochs; --resume auto goes "
        "on with a higher max_hours"
    )
    stopped = load_checkpoint(find_checkpoint(run))
    (row,) = read_rows(run, "val")
    assert (stopped.step, stopped.metrics["top1"], row["step"]) == (1, row["top1"], 1)
    assert row["report"]["micro"]["top1"] == row["top1"] and stopped.progress.val_errors == ()
    assert [row["step"] for row in read_rows(run, "train")] == [1]

    train(data, run.parent, (*common, "max_hours=1"), "auto")
    ended = load_checkpoint(find_checkpoint(run, pointer="last"))
    assert 0 < stopped.progress.seconds < ended.progress.seconds
    assert compare_runs(run, whole)[0]
    rows = comparable(read_rows(run, "val"))
    assert equal_trees(rows[1:], comparable(read_rows(whole, "val"))) and len(rows) == 3
