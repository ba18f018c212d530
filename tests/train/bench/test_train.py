"""The benchmarks report what they measured; no test depends on how fast this machine is."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import train.bench.train
from tests.helpers.failing_steps import FailingSteps
from tests.helpers.ranks import run_command
from train.bench.harness import Case, CaseError, Report
from train.bench.subjects import StepSpec, make_specs
from train.bench.train import (
    LIMIT_S,
    Measured,
    bench_train,
    build_limit_s,
    choice_lines,
    describe,
    make_ratios,
    measure_batch,
)


def test_bench_train_goes_on_without_a_subject_that_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub(Case):
        """Answers, until the time of `owt` is over in the second round."""

        def __init__(
            self, _stack: ExitStack, _make: object, spec: StepSpec, *_: object, **__: object
        ) -> None:
            self.name, self.left = str(spec), 1 if spec.subject == "owt" else 9

        def build(self) -> None:
            pass

        def request(self, *request: object) -> Any:
            self.left -= request[0] == "step_s"
            if self.left < 0:
                raise CaseError(f"{self.name}: cut off after 60 s")
            return 3.0 if request[0] == "step_s" else {}

    monkeypatch.setattr(train.bench.train, "gemm_gflops", lambda *_: 1.0)
    monkeypatch.setattr(train.bench.train, "Case", Stub)
    specs = make_specs(["owt", "torchvision_fp32"], [8], "fp32", "cpu")
    assert [spec.subject for spec in specs] == ["torchvision_fp32", "owt"]
    measured = Measured(crop_px=224)
    measure_batch(measured, specs, set(), 3, Path(), "cpu")
    assert measured.seconds == {(specs[0], "step"): [3.0, 3.0, 3.0]}
    assert measured.failures == {specs[1]: "cut off after 60 s"}
    ratios, _ = make_ratios(specs, measured)
    assert ratios["owt_mfu"] is None and ratios["owt_vs_torchvision_reference"] is None
    assert LIMIT_S == {"cpu": None, "cuda": 60}
    assert [build_limit_s(spec, "cuda") for spec in specs] == [None, 180]


def bench(*only: str, num_rounds: int = 1) -> Report:
    """`bench_train` at its smallest, without the loader."""
    return bench_train(
        only=only, batches=[2], precision="fp32", num_rounds=num_rounds, crop_px=64, folder=None, images=2,
        device="cpu",
    )  # fmt: skip


def test_bench_train_gives_a_row_to_subjects_past_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.bench.train, "LIMIT_S", {"cpu": 0.05})
    report = bench("owt", "torchvision_fp32", "lrn")
    assert [row["failure"] for row in report["rates"]] == ["cut off after 0.05 s"] * 2
    assert report["notes"][-1] == "lrn: 2: cut off after 0.05 s"
    lines = describe(report)
    assert any(re.match(r"owt fp32 batch 2 +- .* -cut off after 0.05 s$", line) for line in lines)


def test_bench_train_gives_a_row_to_subjects_that_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.bench.train, "open_steps", FailingSteps)
    monkeypatch.setattr(train.bench.train, "gemm_gflops", lambda *_: 1.0)
    report = bench("torchvision_fp32", "owt", "paper", "bn", num_rounds=2)
    whole, late, dead, never = report["rates"]
    assert whole["failure"] is None and whole["operators"] == 5.0 and whole["kernels"] is None
    assert late["failure"] == "RuntimeError: no events" and late["operators"] is None
    assert [row["phases"]["step"]["rounds"] for row in (whole, late)] == [[4.0, 4.0]] * 2
    assert dead["failure"] == "its process ended with code 3" and not dead["phases"]
    assert never["failure"] == "MemoryError: CUDA out of memory. Tried to allocate 9 GiB"
    assert report["ratios"]["owt_vs_torchvision_reference"] == 1.0
    assert report["notes"][-1] == "owt fp32 batch 2: RuntimeError: no events"


def test_table_ends_with_the_steps_that_ran_and_why() -> None:
    rows: list[dict[str, Any]] = [
        {"subject": "torchvision_bf16", "step": None, "why": None},
        {"subject": "owt", "step": "plain", "why": "the fast one needs a GPU"},
        {"subject": "owt_plain", "step": "plain", "why": "fused=off"},
        {"subject": "bn", "step": "plain", "why": "the fast one needs a GPU"},
    ]
    assert choice_lines(rows) == ["owt, bn: plain (the fast one needs a GPU)", "owt_plain: plain (fused=off)"]


@pytest.mark.slow
def test_bench_train_reports_what_it_measured(tmp_path: Path) -> None:
    only = ["--only=owt", "--only=torchvision_fp32", "--only=end_to_end"]
    options = ["--batch=4", "--crop=64", "--precision=fp32", "--images=128", "--rounds=1", *only]
    done = run_command(
        ["alexnet", "bench", "train", "--json", f"--folder={tmp_path / 'images'}", *options], cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    reference, owt = report["rates"]
    assert set(owt["phases"]) == {"step", "loader", "end_to_end"} and set(reference["phases"]) == {"step"}
    assert reference["subject"]["subject"] == "torchvision_fp32"
    step = owt["phases"]["step"]
    gflops = step["images_per_s"] * owt["gflop_per_image"]
    assert step["mfu"] == pytest.approx(gflops / report["gemm_gflops"]["fp32"], rel=0.01)
    assert report["ratios"]["owt_mfu"] == step["mfu"]
    assert report["ratios"]["owt_vs_torchvision_reference"] == pytest.approx(
        step["images_per_s"] / reference["phases"]["step"]["images_per_s"], rel=0.01
    )
    assert report["ratios"]["owt_vs_best_torchvision"] == report["ratios"]["owt_vs_torchvision_reference"]
    assert report["ratios"]["paper_vs_no_lrn"] is None
    assert any("paper_vs_no_lrn" in note for note in report["notes"])
    assert (owt["step"], owt["why"]) == ("plain", "the fast one needs a GPU")
    assert reference["step"] is reference["why"] is None and owt["first_step_s"] > owt["choice_s"] > 0
    assert report["ratios"]["owt_fast_vs_plain"] is None
    assert "owt_fast_vs_plain: owt runs by the plain step itself" in report["notes"]
    assert owt["peak_memory_mb"] > 100 and owt["operators"] > 100 and owt["launches"] is None
    assert "gpuGetDeviceCount" not in done.stderr
