"""The flat-loss guard: on the digits PyTorch's default initialisation triggers it, and He's does not."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.common.errors import DivergedError
from tests.helpers.ranks import read_rows
from tests.helpers.thin_networks import networks_with
from train.config.load import make_config
from train.distributed.world import open_world
from train.health.flat_loss import FlatLoss, describe_flat, flat_level, suggest_changes
from train.health.metrics import Metrics
from train.loop import run_epochs
from train.setup import build_run

GRACE = 30
LEVEL = float(np.log(10))


def losses(loss: float, num_samples: int = 10) -> Metrics:
    return Metrics(loss=loss, top1=0.1, top5=0.5, num_samples=num_samples, num_failed=0)


def watch(values: list[float], *, every: int = 1, grace: int = 20) -> list[int]:
    """For how many steps the loss counts as flat after each row."""
    flat, found = FlatLoss(), []
    for number, value in enumerate(values, start=1):
        flat = flat.after(number * every, losses(value), LEVEL, grace)
        found.append(flat.num_steps)
    return found


def test_flat_loss_counts_only_steps_at_the_level() -> None:
    assert watch([LEVEL] * 6) == [0, 2, 2, 4, 4, 6]  # windows of a tenth of the grace steps
    assert watch([LEVEL * 1.02, LEVEL * 0.99] * 3)[-1] == 6  # by the mean, no single batch decides
    assert watch([LEVEL] * 4 + [LEVEL * 0.99] * 2 + [LEVEL] * 2) == [0, 2, 2, 4, 4, 0, 0, 2]
    assert watch([LEVEL * 1.3] * 6)[-1] == 0  # early, or unstable: not what this guard is for
    assert watch([LEVEL] * 3, every=20) == [20, 40, 60]  # rows further apart than a window


def test_flat_loss_ignores_rows_of_skipped_steps() -> None:
    flat = FlatLoss().after(2, losses(LEVEL), LEVEL, 20)
    later = flat.after(4, losses(float("nan"), num_samples=0), LEVEL, 20)
    assert later == flat
    assert later.after(5, losses(LEVEL), LEVEL, 20) == FlatLoss(since=0, window_start=5)


def test_flat_level_is_the_loss_of_the_best_constant_guess() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2])
    counts = np.bincount(labels).astype(float)
    for smoothing in (0.0, 0.1):
        shares = (1 - smoothing) * np.array([0.6, 0.3, 0.1]) + smoothing / 3
        assert flat_level(counts, smoothing) == pytest.approx(-(shares * np.log(shares)).sum())
    assert flat_level(np.ones(200), 0.1) == pytest.approx(np.log(200))
    # Balanced by weights, guessing costs what it does where all classes are as frequent.
    assert flat_level(counts, 0.0, 10 / 3 / counts) == pytest.approx(np.log(3))


def train(init: str, data: Path, out: Path, *more: str) -> Path:
    """An epoch of a quarter of AlexNet's channels on small digits, on one rank; the run's folder."""
    settings = (
        f"model.init={init}", "preprocessing.resize_px=44", "preprocessing.crop_px=40", "precision=fp32",
        "model.hidden_units=512",
        "cpu_threads=1", "epochs=1", "global_batch=32", "schedule.kind=constant", "schedule.warmup_epochs=0",
        "schedule.learning_rate=0.02", "log_every=3", f"flat_loss_grace={GRACE}", *more,
    )  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(networks_with(24, 64, 96, 96, 64))
        world = stack.enter_context(open_world("cpu"))
        run_state = build_run(make_config("demo", settings, data), out, "none", world, stack)
        run_epochs(run_state)
    (run,) = out.iterdir()
    return run


@pytest.mark.slow
def test_flat_loss_ends_a_run_with_torchs_initialisation(demo_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergedError) as caught:
        train("torch", demo_data, tmp_path)
    said = str(caught.value)
    assert "within half a percent of 2.302" in said and f"for {GRACE} steps" in said
    normed = make_config("demo", ["model.norm=bn_after_relu"]).model
    assert suggest_changes(normed) == []
    assert "Try model.init=he in place of torch, or batch normalisation (model.name=bn), or another" in said
    assert "flat_loss_grace=30 is how many steps it may; 0 turns this check off" in said
    assert said.endswith("There is no checkpoint yet")
    (run,) = tmp_path.iterdir()
    assert read_rows(run, "train")[-1]["step"] == GRACE


@pytest.mark.slow
def test_flat_loss_does_not_end_a_run_with_he_initialisation(demo_data: Path, tmp_path: Path) -> None:
    rows = read_rows(train("he", demo_data, tmp_path), "train")
    assert rows[-1]["step"] == 45
    assert min(row["loss"] for row in rows if row["step"] <= GRACE) < 0.97 * LEVEL


def test_flat_loss_advice_fits_the_configuration() -> None:
    config = make_config("demo", ["model.name=bn", "schedule.learning_rate=3"])
    said = describe_flat(LEVEL, 10, 60, config)
    assert "Try another schedule.learning_rate than 3. " in said
