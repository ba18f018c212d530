"""The benchmarks report what they measured; no test depends on how fast this machine is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest

import train.bench.train
from tests.helpers.command_line import invoke
from tests.helpers.failing_steps import FailingSteps, NoProducts, TwoProducts, small_gemm_parts
from train.bench.harness import Bench, Case, Report, describe, four_digits
from train.bench.subjects import StepSpec, make_specs
from train.bench.train import bench_train, measure_batch
from train.bench.trainer import gflop_of


@pytest.mark.parametrize(
    ("device", "ours", "theirs"), [("cpu", [None] * 2, [None]), ("cuda", [180, 60], [60])]
)
def test_only_building_ours_has_time_of_its_own(
    device: Literal["cpu", "cuda"], ours: list[float | None], theirs: list[float | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    limits: dict[str, list[float | None]] = {}

    class Stub(Case):
        """Keeps its limits; answers nothing."""

        def __init__(self, *arguments: object, **_: object) -> None:
            (self.name,) = (str(spec) for spec in arguments if isinstance(spec, StepSpec))

        def build(self) -> None:
            pass

        def limit(self, seconds: float | None) -> None:
            limits.setdefault(self.name, []).append(seconds)

        def request(self, *_: object) -> Any:
            return {}

    monkeypatch.setattr(train.bench.harness, "Case", Stub)
    specs = {str(spec): spec for spec in make_specs(["owt", "torchvision_fp32"], [8], "fp32", device)}
    measure_batch(Bench(), specs, {}, 1, 224, None, device)
    assert limits == {"torchvision_fp32 fp32 batch 8": theirs, "owt fp32 batch 8": ours}


def bench_failing(
    monkeypatch: pytest.MonkeyPatch, *only: str, products: type[TwoProducts] = TwoProducts
) -> Report:
    """Two rounds of `FailingSteps`, each a process."""
    monkeypatch.setattr(train.bench.train, "StepCase", FailingSteps)
    monkeypatch.setattr(train.bench.train, "PartsCase", products)
    monkeypatch.setattr(train.bench.train, "gemm_parts", small_gemm_parts)  # sent by name: ours needs torch
    return bench_train(
        only=only, batches=[2], precision="fp32", num_rounds=2, crop_px=64, folder=None, images=2,
        device="cpu",
    )  # fmt: skip


@pytest.mark.slow
def test_bench_train_goes_on_without_a_subject_that_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.bench.train, "LIMITS_S", {"cpu": (5, 300)})
    report = bench_failing(monkeypatch, "owt", "caffe")
    owt, caffe = report["rows"][:2]
    assert (caffe["case"], caffe["failure"]) == ("caffe fp32 batch 2", "cut off after 5 s")
    assert caffe["first_step_s"] == 1.0 and "images_per_s" not in caffe
    assert report["rounds"][owt["case"]] == {"images_per_s": [4.0, 4.0]}


@pytest.mark.slow
def test_bench_train_gives_a_row_to_subjects_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    report = bench_failing(monkeypatch, "torchvision_fp32", "owt", "paper", "bn")
    whole, late, dead, never = report["rows"]
    assert whole["failure"] is None and whole["operators"] == 5.0
    assert late["failure"] == "RuntimeError: no events" and "operators" not in late
    assert whole["images_per_s"] == late["images_per_s"] == 4.0
    assert dead["failure"] == "its process ended with code 3" and "images_per_s" not in dead
    assert never["failure"] == "MemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    assert report["ratios"]["owt_vs_torchvision_reference"] == 1.0
    assert report["gemm_gflops"] == {"fp32": 20.0}
    assert late["mfu"] == four_digits(4.0 * gflop_of("owt", 64) / 20.0)
    (line,) = (line for line in describe(report) if line.startswith("paper "))
    assert re.fullmatch(r"paper fp32 batch 2 .* plain .* it is slow +its process ended with code 3", line)


def test_matrix_products_that_fail_have_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    report = bench_failing(monkeypatch, "owt", products=NoProducts)
    assert report["rows"][-1] == {"case": "gemm fp32 batch 2", "failure": "RuntimeError: no blocks"}
    assert report["gemm_gflops"] == {"fp32": None} and report["ratios"]["owt_mfu"] is None


@pytest.mark.slow
@pytest.mark.usefixtures("thin", "warm_cases")
def test_bench_train_reports_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train.bench.train, "gemm_parts", small_gemm_parts)
    monkeypatch.setattr(train.bench.train, "STEPS", {"cpu": (1, 0)})
    monkeypatch.setattr(train.bench.train, "FED_STEPS", {"cpu": 1})
    only = ["--only=owt", "--only=torchvision_fp32", "--only=end_to_end"]
    options = ["--batch=2", "--crop=64", "--precision=fp32", "--images=8", "--rounds=1", *only]
    done = invoke("bench", "train", "--json", f"--folder={tmp_path / 'images'}", *options)
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    reference, owt = report["rows"]
    assert reference["case"] == "torchvision_fp32 fp32 batch 2" and "loader_images_per_s" not in reference
    rounds = report["rounds"][owt["case"]]
    assert set(rounds) == {
        "images_per_s", "peak_memory_mb", "loader_images_per_s", "end_to_end_images_per_s",
        "end_to_end_vs_slowest_part",
    }  # fmt: skip
    assert report["ratios"]["end_to_end_vs_slowest_part"] == owt["end_to_end_vs_slowest_part"] > 0
    gflops = owt["images_per_s"] * owt["gflop_per_image"]
    assert owt["mfu"] == pytest.approx(gflops / report["gemm_gflops"]["fp32"], rel=0.01)
    assert report["ratios"]["owt_mfu"] == owt["mfu"]
    assert report["ratios"]["owt_vs_torchvision_reference"] == pytest.approx(
        owt["images_per_s"] / reference["images_per_s"], rel=0.01
    )
    assert report["ratios"]["owt_vs_best_torchvision"] == report["ratios"]["owt_vs_torchvision_reference"]
    assert report["ratios"]["paper_vs_no_lrn"] is None
    assert any("paper_vs_no_lrn" in note for note in report["notes"])
    assert (owt["step"], owt["why"]) == ("plain", "the fast one needs a GPU")
    assert "step" not in reference and owt["first_step_s"] > owt["choice_s"] > 0
    assert report["ratios"]["owt_fast_vs_plain"] is None
    assert "owt_fast_vs_plain: owt runs by the plain step itself" in report["notes"]
    assert owt["peak_memory_mb"] > 100 and owt["operators"] > 100 and "launches" not in owt
    assert "gpuGetDeviceCount" not in done.stderr + capfd.readouterr().err
