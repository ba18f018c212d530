"""The benchmarks report what they measured; no test depends on how fast this machine is."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path

import pytest

import train.bench.train
from tests.helpers.ranks import run_command
from train.bench.harness import OutOfTimeError
from train.bench.images import write_bench_images, write_small_images
from train.bench.loaders import Kind, LoaderCase, Subject, time_batches
from train.bench.train import LIMIT_S, Measured, make_ratios, make_specs, measure_passes


@pytest.mark.slow
def test_bench_data_reports_ratios_of_what_it_measured(tmp_path: Path) -> None:
    options = ["--json", f"--folder={tmp_path / 'images'}", "--images=128", "--rounds=1", "--batches=4"]
    done = run_command(["alexnet", "bench", "data", *options], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    rates = {(row["name"], row["cores"]): row["rounds"][0] for row in report["rates"]}
    cores = max(n for _, n in rates)
    assert report["num_images"] == 128 and report["images_per_round"] == 256
    assert {name for name, n in rates if n == cores} == {
        "dali", "shards", "torchvision", "dali_reader", "pillow", "overlap",
        "feed_shards", "feed_files", "file_read", "cached", "uncached",
    }  # fmt: skip
    for name, top, bottom in (
        ("dali_vs_torchvision_2_cores", ("dali", 2), ("torchvision", 2)),
        ("dali_vs_torchvision_1_core", ("dali", 1), ("torchvision", 1)),
        ("own_order_vs_dali_reader", ("dali", cores), ("dali_reader", cores)),
        ("shards_vs_files", ("shards", cores), ("dali", cores)),
        ("overlap", ("overlap", cores), ("dali", cores)),
        ("feed_files_vs_dali_read", ("feed_files", cores), ("file_read", cores)),
        ("cached_vs_uncached", ("cached", cores), ("uncached", cores)),
        ("dali_gpu_vs_reader", ("dali_gpu", cores), ("dali_gpu_reader", cores)),
    ):
        if top in rates and bottom in rates:
            assert report["ratios"][name] == pytest.approx(rates[top] / rates[bottom], rel=0.01)
        else:
            assert report["ratios"][name] is None and any(name in note for note in report["notes"])
    assert "round 1 of 1" in done.stderr
    assert len(report["memory_mb"]) == 20 and min(report["memory_mb"]) > 50


@pytest.mark.slow
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


@pytest.mark.parametrize("kind", ["cached", "cached_on_device", "feed", "file_read"])
def test_fast_loaders_make_the_batches_they_are_asked_for(tmp_path: Path, kind: Kind) -> None:
    """On the CPU, by the code that a GPU runs too: only the device is another."""
    photos = write_bench_images(tmp_path / "photos", 16)
    write_small_images(tmp_path / "small", photos, 40)
    subject = Subject("any", kind, tmp_path / "small", 2, batch=8, crop_px=56)
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        case = LoaderCase(stack, subject)
        images_per_s, busy_us = case.measure(6, 0)
        assert images_per_s > 0 and busy_us > 0
        assert list(case._batches(3)) == [8, 8, 8]


def test_bench_round_is_timed_from_first_to_last_batch() -> None:
    def batches(count: int) -> Generator[int, None, None]:
        time.sleep(0.3)  # filling the pipeline
        for _ in range(count):
            yield 10

    rate, busy_us = time_batches(batches, 4, 0.05)
    assert 40 / 0.5 < rate <= 40 / 0.2
    assert 0 <= busy_us < 1e6 * 0.05 / 10  # it sleeps


def test_bench_train_ratios_use_the_right_cases() -> None:
    specs = make_specs(["owt", "paper"], [8], ["bf16", "fp32"], True)
    step_s = {"owt bf16": 1.0, "torchvision fp32": 4.0, "paper bf16": 2.0, "none": 1.5, "torch": 7.0}
    measured = Measured(crop_px=224)
    for spec in specs:
        named = spec.lrn if spec.lrn in ("none", "torch") else f"{spec.name} {spec.precision}"
        measured.seconds[spec, "step"] = [100.0 if spec.compiled else step_s.get(named, 50.0)] * 2
    measured.seconds[specs[0], "fed_step"] = [1.0, 1.0]
    measured.seconds[specs[0], "loader"] = [0.1, 1.5]
    measured.seconds[specs[0], "end_to_end"] = [2.0, 2.0]
    measured.lrn_s["a"] = {"torch": 6.0, "eager": 2.0, "fused": 1.0}
    measured.lrn_s["b"] = {"torch": 5.0, "eager": 2.0, "fused": 1.0}
    measured.gemm_gflops = {"bf16": 100.0, "fp32": 50.0}
    flops = 0.7e9 * 2 * 3
    ratios, notes = make_ratios(specs, measured)
    mfu = ratios.pop("owt_mfu")
    assert mfu == pytest.approx(8 * flops / 100e9, rel=0.05)
    assert ratios == {
        "owt_vs_torchvision_reference": 4.0,
        "paper_vs_no_lrn": 0.75,
        "paper_vs_torch_lrn": 3.5,
        "lrn_eager_vs_torch": 2.5,
        "lrn_fused_vs_torch": 5.0,
        "end_to_end_vs_slowest_part": 0.625,
    }
    assert not [note for note in notes if "not measured" in note]


def test_bench_train_goes_on_without_a_subject_that_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        """Answers, until its time is over in the second round."""

        def __init__(self, num_rounds: int) -> None:
            self.left = num_rounds

        def request(self, method: str, *arguments: object) -> dict[str, float]:
            self.left -= 1
            if self.left < 0:
                raise OutOfTimeError("cut off after 60 s")
            return {"forward": 1.0, "backward": 2.0, "step": 3.0}

    monkeypatch.setattr(train.bench.train, "gemm_gflops", lambda *_: 1.0)
    specs = make_specs(["owt"], [8], ["fp32"], False)
    measured, cases = Measured(crop_px=224), dict(zip(specs, map(Stub, (1, 9)), strict=True))
    for _ in range(3):
        measure_passes(measured, cases, ["fp32"], "cpu")  # type: ignore[arg-type]
    assert list(cases) == specs[1:] and {spec for spec, _ in measured.seconds} == {specs[1]}
    assert len(measured.seconds[specs[1], "step"]) == 3
    assert measured.cut_off == ["owt fp32 batch 8: cut off after 60 s"]
    ratios, _ = make_ratios(list(cases), measured)
    assert ratios["owt_mfu"] is None and ratios["owt_vs_torchvision_reference"] is None
    assert LIMIT_S == {"cpu": None, "cuda": 60}


@pytest.mark.slow
def test_bench_train_reports_what_it_measured(tmp_path: Path) -> None:
    options = ["--batch=4", "--crop=64", "--variant=owt", "--precision=fp32", "--images=128", "--rounds=1"]
    done = run_command(
        ["alexnet", "bench", "train", "--json", f"--folder={tmp_path / 'images'}", *options], cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    owt, reference = report["rates"]
    assert set(owt["phases"]) == {"forward", "backward", "step", "loader", "end_to_end"}
    assert reference["subject"]["name"] == "torchvision"
    step = owt["phases"]["step"]
    gflops = step["images_per_s"] * sum(owt["flops_per_image"].values()) / 1e9
    assert step["mfu"] == pytest.approx(gflops / report["gemm_gflops"]["fp32"], rel=0.01)
    assert report["ratios"]["owt_mfu"] == step["mfu"]
    assert report["ratios"]["owt_vs_torchvision_reference"] == pytest.approx(
        step["images_per_s"] / reference["phases"]["step"]["images_per_s"], rel=0.01
    )
    assert report["ratios"]["paper_vs_no_lrn"] is None
    assert any("paper_vs_no_lrn" in note for note in report["notes"])
    assert owt["peak_memory_mb"] > 100
