"""The benchmarks measure what they say; how fast this machine is, no test asks."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.helpers.ranks import run_command
from train.bench.data import time_batches


def test_bench_data_reports_ratios_of_what_it_measured(tmp_path: Path) -> None:
    options = ["--json", f"--folder={tmp_path / 'images'}", "--images=128", "--rounds=1", "--batches=4"]
    done = run_command(["alexnet", "bench", "data", *options], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rates = {(row["name"], row["cores"]): row["rounds"][0] for row in report["rates"]}
    cores = max(n for _, n in rates)
    assert report["num_images"] == 128 and report["images_per_round"] == 256
    assert {name for name, n in rates if n == cores} == {
        "dali", "shards", "torchvision", "dali_reader", "pillow", "overlap"
    }  # fmt: skip
    for name, top, bottom in (
        ("dali_vs_torchvision_2_cores", ("dali", 2), ("torchvision", 2)),
        ("dali_vs_torchvision_1_core", ("dali", 1), ("torchvision", 1)),
        ("own_order_vs_dali_reader", ("dali", cores), ("dali_reader", cores)),
        ("shards_vs_files", ("shards", cores), ("dali", cores)),
        ("overlap", ("overlap", cores), ("dali", cores)),
    ):
        if top in rates and bottom in rates:
            assert report["ratios"][name] == pytest.approx(rates[top] / rates[bottom], rel=0.01)
        else:
            assert report["ratios"][name] is None and any(name in note for note in report["notes"])
    assert "round 1 of 1" in done.stderr
    assert len(report["memory_mb"]) == 20 and min(report["memory_mb"]) > 50


def test_bench_startup_uses_the_index_and_sees_changes(tmp_path: Path) -> None:
    options = ["--json", "--files=12000", f"--folder={tmp_path / 'links'}"]
    done = run_command(["alexnet", "bench", "startup", *options], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [report[start]["num_images"] for start in ("first", "again", "changed")] == [12000, 12000, 12001]
    assert all(
        report[start]["seconds"] > 0 and report[start]["memory_mb"] > 50 for start in ("first", "again")
    )
    assert len(list((tmp_path / "links" / "train").rglob("*.jpg"))) == 12000


def test_bench_round_is_timed_from_first_to_last_batch() -> None:
    def batches(count: int) -> Generator[int, None, None]:
        time.sleep(0.3)  # filling the pipeline
        for _ in range(count):
            yield 10

    rate = time_batches(batches, 4, 0.05)
    assert 40 / 0.5 < rate <= 40 / 0.2
