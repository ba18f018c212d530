"""The schedule and averages of a run, on two ranks and after a resume."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import msgspec
import pytest
import torch

from tests.helpers.ranks import TINY, comparable, link_subset, read_rows
from tests.helpers.warm_ranks import train_warm
from train.checkpoints.load import find_checkpoint, load_checkpoint
from train.evaluate import evaluate_checkpoint, load_split

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thin")]

EPOCHS = 4
SETTINGS = (
    *TINY, "model.name=bn", f"epochs={EPOCHS}", "global_batch=20", "schedule.kind=plateau",
    "schedule.learning_rate=0.01", "schedule.warmup_epochs=0", "schedule.patience=1",
    "schedule.min_improvement=0.9", "schedule.max_drops=1",
    "optimizer.name=lars", "optimizer.momentum_form=paper", "ema_decay=0.5",
)  # fmt: skip


def test_resumed_run_has_the_same_rates_and_the_same_bits(demo_data: Path, tmp_path: Path) -> None:
    """No epoch improves by 0.9, so that the rate falls after the second, and then no more."""
    data = link_subset(demo_data, tmp_path / "data", num_train=20, num_val=10)
    run = train_warm(2, data=data, out=tmp_path / "runs", overrides=SETTINGS)
    rows = {split: comparable(read_rows(run, split)) for split in ("train", "val")}
    assert [row["lr"] for row in rows["train"]] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    folder = find_checkpoint(run, pointer="last")
    expected = load_checkpoint(folder)
    shutil.rmtree(folder)
    resumed = train_warm(2, data=data, out=run.parent, overrides=SETTINGS, options=["--resume=auto"])
    assert resumed == run
    assert {split: comparable(read_rows(run, split)) for split in rows} == rows
    found = load_checkpoint(folder)
    assert found.step == expected.step == EPOCHS
    assert msgspec.structs.replace(found.progress, seconds=expected.progress.seconds) == expected.progress
    assert list(found.progress.val_errors) == [1 - row["top1"] for row in rows["val"]]
    for name, value in expected.model_state.items():
        assert torch.equal(found.model_state[name], value), name
        assert torch.equal(found.average_state[name], expected.average_state[name]), name
    # The average is what the run was judged by, and what is evaluated and exported.
    assert found.weights_name == "average" and found.description.endswith("(ema_decay 0.5)")
    judged, *_ = evaluate_checkpoint(found, load_split(found, None, "val"))
    assert judged.loss == pytest.approx(rows["val"][-1]["loss"], rel=1e-4)
    last, *_ = evaluate_checkpoint(
        dataclasses.replace(found, states=found.states | {"average": {}}), load_split(found, None, "val")
    )
    assert abs(last.loss - judged.loss) > 1e-3


def test_ranks_end_after_the_same_step_when_time_is_over(demo_data: Path, tmp_path: Path) -> None:
    data = link_subset(demo_data, tmp_path / "data", num_train=20, num_val=10)
    settings = (*SETTINGS, "global_batch=10", "max_hours=1e-9")
    run = train_warm(2, data=data, out=tmp_path / "runs", overrides=settings)
    assert [row["step"] for row in read_rows(run, "train")] == [1]
    (row,) = read_rows(run, "val")
    assert (row["step"], row["samples"], "report" in row) == (1, 10, True)
    assert load_checkpoint(find_checkpoint(run)).step == 1 and (run / "confusion.csv").is_file()
