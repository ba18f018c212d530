"""Whole runs of several ranks: the same on any number of them, and the same after a kill as without."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.datasets.image_folder import load_image_folder
from scripts.soak.compare import compare_runs
from scripts.soak.evidence import read_evidence
from tests.helpers.ranks import TINY, link_subset, read_rows
from tests.helpers.warm_ranks import ranks_of, run_ranks, train_warm
from train.checkpoints.load import find_checkpoint, load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thin")]

NUM_STEPS = 12
BATCH = 13  # divides by neither 2 nor 3
NUM_VAL = 35  # nor does this

COMPARABLE = (
    *TINY, "epochs=1", f"global_batch={BATCH}", "schedule.kind=constant", "schedule.warmup_epochs=0",
    "schedule.learning_rate=0.0004", "augment.crop=random_resized", "augment.scale=[0.5, 1.0]",
    "model.dropout=0.5", "checkpoint_every=6",
)  # fmt: skip


@pytest.fixture(scope="module")
def noisy_digits(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits under noise. On flat paper the windows of max pooling tie, rounding decides where their gradient
    goes, and from there on two runs drift apart for reasons outside of training. Here they stay within
    1e-7 of each other."""
    base = tmp_path_factory.mktemp("subset")
    link_subset(demo_data, base / "links", num_train=NUM_STEPS * BATCH, num_val=NUM_VAL)
    generator = np.random.default_rng(0)
    for link in sorted((base / "links").rglob("*.jpg")):
        pixels_HWC = np.asarray(Image.open(link).convert("RGB")) * 0.6
        pixels_HWC = pixels_HWC + generator.uniform(0, 100, pixels_HWC.shape)
        target = (base / "noisy" / link.relative_to(base / "links")).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_HWC.astype(np.uint8)).save(target)
    return base / "noisy"


def train(
    num_ranks: int, data: Path, out: Path, overrides: tuple[str, ...], *options: str, launch: int = 0
) -> Path:
    """A run whose ranks write down, in `evidence` beside it, which samples went into each of their steps."""
    (out.parent / "evidence").mkdir(parents=True, exist_ok=True)
    module: list[str | Path] = ["scripts.soak.rank", out.parent / "evidence", str(launch)]
    settings = (*COMPARABLE, *overrides)
    return train_warm(num_ranks, data=data, out=out, overrides=settings, options=options, module=module)


def stream_of(run: Path) -> list[tuple[int, ...]]:
    """The samples of each step that counts, over all ranks."""
    evidence = read_evidence(run.parent.parent / "evidence", NUM_STEPS)
    assert evidence.problems == []
    return [evidence.steps[step].indices for step in range(1, NUM_STEPS + 1)]


@pytest.fixture(scope="module")
def runs_by_ranks(noisy_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """12 steps with 1, 2 and 3 ranks, with 2 ranks that accumulate, and with split layers on 2 and 4."""
    base = tmp_path_factory.mktemp("ranks")
    hybrid = "parallel=hybrid"
    wanted: dict[str, tuple[int, tuple[str, ...]]] = {
        "1": (1, ()), "2": (2, ()), "3": (3, ()), "2 accumulating": (2, ("micro_batch=5",)),
        "2 hybrid": (2, (hybrid, "micro_batch=4")),  # 3 micro-batches on one rank, 4 on the other
        "4 hybrid": (4, (hybrid,)),
    }  # fmt: skip
    return {
        name: train(ranks, noisy_digits, base / name / "runs", more) for name, (ranks, more) in wanted.items()
    }


@pytest.mark.parametrize("other", ["2", "3", "2 accumulating", "2 hybrid", "4 hybrid"])
def test_samples_and_losses_are_equal_on_any_number_of_ranks(
    runs_by_ranks: dict[str, Path], other: str
) -> None:
    one, many = read_rows(runs_by_ranks["1"], "train"), read_rows(runs_by_ranks[other], "train")
    assert len(one) == len(many) == NUM_STEPS
    losses = [row["loss"] for row in one]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.2, "the run learns nothing: equal losses would say little"
    assert [row["loss"] for row in many] == pytest.approx(losses, rel=1e-4)
    assert [row["samples"] for row in many] == [BATCH] * NUM_STEPS
    assert stream_of(runs_by_ranks[other]) == stream_of(runs_by_ranks["1"])


@pytest.mark.parametrize("other", ["2", "3", "2 accumulating", "2 hybrid", "4 hybrid"])
def test_validation_counts_each_sample_once_on_any_ranks(runs_by_ranks: dict[str, Path], other: str) -> None:
    (one,), (many,) = read_rows(runs_by_ranks["1"], "val"), read_rows(runs_by_ranks[other], "val")
    assert one["samples"] == many["samples"] == NUM_VAL
    assert one["top1"] * NUM_VAL == pytest.approx(round(one["top1"] * NUM_VAL), abs=1e-9)
    assert (many["top1"], many["top5"]) == (one["top1"], one["top5"])
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("before", "after", "overrides"),
    [
        ("2", 1, ()),
        ("1", 2, ("micro_batch=7",)),
        ("2 accumulating", 3, ()),
        ("2 hybrid", 1, ()),
        ("2", 2, ("parallel=hybrid",)),
    ],
)
def test_run_resumes_inside_an_epoch_on_other_ranks_and_modes(
    before: str,
    after: int,
    overrides: tuple[str, ...],
    runs_by_ranks: dict[str, Path],
    noisy_digits: Path,
    tmp_path: Path,
) -> None:
    """As if killed after step 6 of 12: same samples, and losses to 1e-4 of one rank's all through."""
    run = tmp_path / "runs" / runs_by_ranks[before].name
    shutil.copytree(runs_by_ranks[before], run)
    shutil.copytree(runs_by_ranks[before].parent.parent / "evidence", tmp_path / "evidence")
    shutil.rmtree(run / "checkpoints" / f"step-{NUM_STEPS:08d}")
    resumed = train(after, noisy_digits, tmp_path / "runs", overrides, "--resume=auto", launch=1)
    evidence = read_evidence(tmp_path / "evidence", NUM_STEPS)
    assert [evidence.steps[n].world_size for n in (6, 7)] == [int(before[0]), after]
    assert stream_of(run) == stream_of(runs_by_ranks["1"])
    assert resumed == run
    expected, rows = read_rows(runs_by_ranks["1"], "train"), read_rows(run, "train")
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert rows[:6] == read_rows(runs_by_ranks[before], "train")[:6]
    assert rows[6:] != read_rows(runs_by_ranks[before], "train")[6:], "nothing was done again"
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
    assert [(row["samples"], row["lr"]) for row in rows] == [(row["samples"], row["lr"]) for row in expected]
    (found,), (one,) = read_rows(run, "val"), read_rows(runs_by_ranks["1"], "val")
    assert (found["samples"], found["top1"]) == (one["samples"], one["top1"])


def test_checkpoint_holds_the_state_at_the_end_of_training(
    runs_by_ranks: dict[str, Path], noisy_digits: Path
) -> None:
    checkpoint = load_checkpoint(find_checkpoint(runs_by_ranks["2"]))
    assert (checkpoint.step, checkpoint.epoch, checkpoint.samples_seen) == (NUM_STEPS, 1, NUM_STEPS * BATCH)
    assert checkpoint.classes == load_image_folder(noisy_digits, "val").classes
    (row,) = read_rows(runs_by_ranks["2"], "val")
    assert checkpoint.metrics == {"loss": row["loss"], "top1": row["top1"], "top5": row["top5"]}
    assert any((runs_by_ranks["2"] / "tensorboard").iterdir())


def test_killed_and_resumed_run_ends_with_the_same_bits(demo_data: Path, tmp_path: Path) -> None:
    data = link_subset(demo_data, tmp_path / "data", num_train=100, num_val=NUM_VAL)
    # Dropout and every augmentation on: masks and crops must continue as well as weights and momentum.
    settings = (
        *TINY, "model.dropout=0.5", "epochs=6", "global_batch=25", "schedule.kind=cosine",
        "augment.crop=random_resized", "augment.flip=0.5",
    )  # fmt: skip
    whole = train_warm(2, data=data, out=tmp_path / "whole", overrides=settings)
    out = tmp_path / "killed"
    sets = [f"--set={s}" for s in settings]
    with ranks_of(2, ["train.main", f"--data={data}", f"--out={out}", *sets], cwd=tmp_path) as ranks:
        assert ranks.wait_until(lambda: any(out.glob("*/checkpoints/last.json"))), ranks.stderr
        ranks.kill()
    (killed,) = out.iterdir()
    assert len(read_rows(killed, "val")) < 6, "the kill came too late to test anything"
    resumed = train_warm(2, data=data, out=out, overrides=settings, options=["--resume=auto"])
    assert resumed == killed

    assert compare_runs(resumed, whole) == (True, True)


def test_broken_file_is_named_counted_and_left_out(demo_data: Path, tmp_path: Path) -> None:
    data = link_subset(demo_data, tmp_path / "data", num_train=100, num_val=NUM_VAL)
    for split in ("train", "val"):
        link = sorted((data / split / "3").iterdir())[0]
        content = link.read_bytes()
        link.unlink()
        link.write_bytes(content[:300])
    sets = [f"--set={s}" for s in (*TINY, "epochs=2", "global_batch=25")]
    done = run_ranks(2, ["train.main", f"--data={data}", "--out=runs", *sets], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    rows = read_rows(run, "train")
    assert [row["samples"] + row["failed"] for row in rows] == [25] * 8
    assert sum(row["failed"] for row in rows) == 2  # once an epoch, in no one's place
    assert [(row["samples"], row["failed"]) for row in read_rows(run, "val")] == [(NUM_VAL - 1, 1)] * 2
    named = [line for line in done.stderr.splitlines() if "left out" in line]
    assert len(named) == len(set(named))
    for split in ("train", "val"):
        assert any(f"{split}/3/" in line for line in named)
