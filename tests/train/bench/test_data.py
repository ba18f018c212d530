"""`alexnet bench data` and `bench startup` report what they measured; no test depends on how fast that is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import usable_cores
from tests.helpers.command_line import invoke
from train.bench import data
from train.bench.data import RATIOS, bench_data, make_subjects
from train.bench.images import write_photograph
from train.bench.loaders import Subject, our_loader
from train.bench.startup import bench_startup


@pytest.fixture
def small_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the images of benchmarks small: they take longer to write, and to decode, than all else."""

    def write(number: int, target: Path, sides: tuple[int, int], spread: float) -> None:
        write_photograph(number, target, (sides[0] // 4, sides[1] // 4), spread)

    monkeypatch.setattr("train.bench.images.write_photograph", write)


@pytest.mark.slow
@pytest.mark.usefixtures("warm_cases", "small_photographs")
def test_bench_data_reports_ratios_of_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the loaders without a GPU those of some ratios; test_loaders.py opens the others."""
    monkeypatch.setattr(data, "MEMORY_EPOCHS", 3)
    only = ["dali", "dali_reader"]
    options = ["--json", f"--folder={tmp_path / 'images'}", "--images=128", "--rounds=1", "--batches=1"]
    options += [f"--only={name}" for name in only]
    done = invoke("bench", "data", *options)
    assert done.exit_code == 0, done.stderr
    report, two = json.loads(done.stdout), min(2, usable_cores())
    rows = {row["case"]: row for row in report["rows"]}
    assert {name: (row["cores"], row["batch"]) for name, row in rows.items()} == {
        "dali": (two, 64), "dali_reader": (two, 64), "dali_1_core": (1, 64),
    }  # fmt: skip
    assert report["num_images"] == 128 and report["images_per_round"] == 64
    assert all(row["images_per_s"] > 0 and row["failure"] is None for row in rows.values())
    for name, (top, bottom) in RATIOS.items():
        if top in rows and bottom in rows and (two == 2 or name != "dali_vs_torchvision_2_cores"):
            ratio = rows[top]["images_per_s"] / rows[bottom]["images_per_s"]
            assert report["ratios"][name] == pytest.approx(ratio, rel=0.01)
        else:
            assert report["ratios"][name] is None and f"{name}: not measured" in report["notes"]
    overlap = rows["dali"]["overlap_images_per_s"] / rows["dali"]["images_per_s"]
    assert report["ratios"]["overlap"] == pytest.approx(overlap, rel=0.01)
    assert "round 1 of 1" in done.stderr
    assert len(report["memory_mb"]) == 3 and min(report["memory_mb"]) > 50


def test_bench_data_has_a_case_for_each_end_of_a_ratio() -> None:
    """A name that is misspelt in the table of ratios would be a ratio that nobody measures."""
    by_gpu = [make_subjects(Path("a"), Path("b"), Path("c"), 2000, gpu) for gpu in (False, True)]
    cpu, both = ([subject.name for subject in subjects] for subjects in by_gpu)
    assert both[: len(cpu)] == cpu and len(set(both)) == len(both)
    assert {name for pair in RATIOS.values() for name in pair} <= set(both)
    assert [name for name in both if name not in cpu] == [
        "dali_gpu", "dali_gpu_64", "dali_gpu_deterministic", "dali_gpu_shards", "dali_gpu_reader",
        "cached_gpu", "torchvision_all_cores",
    ]  # fmt: skip


@pytest.mark.slow
def test_bench_data_gives_a_row_to_loaders_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Subject("dali", our_loader, tmp_path / "absent", 1)
    monkeypatch.setattr(data, "make_subjects", lambda *_: [absent])
    report = bench_data(tmp_path / "images", images=2, num_rounds=1, batches=1, only=["dali"])
    (row,) = report["rows"]
    assert row["case"] == "dali" and row["cores"] == 1 and "absent" in row["failure"]
    assert report["memory_mb"] is None and set(report["ratios"].values()) == {None}
    with pytest.raises(UserError, match=r"no loader 'dali_2_cores' on this machine: there are dali$"):
        bench_data(tmp_path / "images", images=2, num_rounds=1, batches=1, only=["dali", "dali_2_cores"])


@pytest.mark.slow
@pytest.mark.usefixtures("warm_cases", "small_photographs")
def test_bench_startup_uses_the_index_and_sees_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.bench.images.FOLDER", tmp_path / "photographs")
    done = invoke("bench", "startup", "--json", "--files=12000", f"--folder={tmp_path / 'links'}")
    assert done.exit_code == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["case"], row["num_images"]) for row in rows] == [
        ("first", 12000),
        ("again", 12000),
        ("changed", 12001),
    ]
    assert all(row["first_batch_s"] > 0 and row["peak_memory_mb"] > 50 for row in rows)
    assert len(list((tmp_path / "links" / "train").rglob("*.jpg"))) == 12000


def test_bench_startup_links_to_a_few_photographs_at_the_least(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the fewest files that the command takes."""
    monkeypatch.setattr("train.bench.images.FOLDER", tmp_path / "photographs")
    monkeypatch.setattr("train.bench.startup.run_alone", lambda *_: {"num_images": 256})
    monkeypatch.setattr("train.bench.startup.SETTLE_NS", 0)
    assert len(bench_startup(tmp_path / "links", files=256)["rows"]) == 3
    assert len(list((tmp_path / "links").rglob("*.jpg"))) == 256
    assert len(list((tmp_path / "photographs" / "12").rglob("*.jpg"))) == 12
