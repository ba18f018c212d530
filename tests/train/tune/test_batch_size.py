"""`alexnet bench batch`: what follows from its figures, and the command on real steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from alexnet import main
from tests.helpers.ranks import TINY, link_subset
from train.tune.batch_size import BatchRow, advise_batch, extrapolate, find_knee


def rows(*figures: tuple[int, float, float]) -> list[BatchRow]:
    return [BatchRow(batch=b, images_per_s=speed, step_ms=1.0, memory_mb=mb) for b, speed, mb in figures]


def test_knee_is_the_smallest_batch_near_full_throughput() -> None:
    measured = rows((8, 40, 100), (16, 70, 110), (32, 91, 130), (64, 100, 170), (128, 95, 250))
    assert find_knee(measured) == 32
    assert extrapolate(measured, 1250) == 128 + 800  # (250 - 170) / 64 MB an image
    assert extrapolate(measured[:1], 1e9) == 8
    assert extrapolate(rows((8, 1, 100), (16, 1, 100)), 200) == 2**20


def test_batch_advice_lies_between_knee_and_noise_scale() -> None:
    batch, why = advise_batch(32, 500.0, 4096, 1)
    assert batch == 32 and "32 images a rank" in why and "about 500" in why and "up to 8 such ranks" in why
    batch, why = advise_batch(32, 500.0, 4096, 64)
    assert batch == 256 and "5.1 times the fewest samples" in why and "fewer ranks would do as well" in why
    batch, why = advise_batch(32, None, 4096, 4)
    assert batch == 128 and "could not be told" in why
    assert advise_batch(64, 500.0, 16, 1)[0] == 16  # more do not fit


@pytest.mark.slow
@pytest.mark.usefixtures("thin", "warm_cases")
def test_bench_batch_measures_sizes_memory_and_noise_scale(
    demo_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = link_subset(demo_data, tmp_path / "data", num_train=60, num_val=10)
    picture = tmp_path / "batches.png"
    sets = [f"--set={text}" for text in (*TINY, "global_batch=20")]
    options = [
        "--from=4",
        "--to=8",
        "--steps=2",
        "--noise-steps=12",
        "--ranks=2",
        f"--plot={picture}",
        "--json",
    ]
    done = CliRunner().invoke(main, ["bench", "batch", f"--data={data}", *sets, *options])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert [row["batch"] for row in report["rows"]] == [4, 8] and report["did_not_fit"] is None
    for row in report["rows"]:
        assert row["images_per_s"] == pytest.approx(1000 * row["batch"] / row["step_ms"], rel=0.01)
        assert 100 < row["memory_mb"] < 4000
    assert [row["step"] for row in report["noise"]] == [2, 4, 6, 8, 10, 12]
    assert report["global_batch"] >= 2 and report["ranks"] == 2 and report["why"]
    assert picture.read_bytes().startswith(b"\x89PNG")

    options[-2:] = [f"--plot={picture}", "--limit-mb=50"]
    measured = BatchRow(**report["rows"][0])
    monkeypatch.setattr("train.tune.batch_size.run_alone", lambda *_: measured)
    done = CliRunner().invoke(main, ["bench", "batch", f"--data={data}", *sets, *options])
    assert done.exit_code == 2 and "a batch of 4, which takes" in done.stderr and "of 50" in done.stderr
