"""`alexnet bench infer` on a few photographs: what it reports, and that it hangs together."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

import infer.bench.predict
from infer.bench.predict import bench_infer, make_ratios
from train.bench.harness import Bench, Report, describe

PHASES = ("decode", "preprocess", "copy", "model", "post", "end_to_end")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, thin: None, warm_cases: None) -> Report:
    """Small, and with int8, whose gate it has to pass; in batches of 8, since decoding takes long."""
    folder: Path = tmp_path_factory.mktemp("bench") / "photos"
    assert infer.bench.predict.FIRST_BATCH == 32
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(infer.bench.predict, "FIRST_BATCH", 8)
        return bench_infer(
            folder, models=("paper",), precisions=("fp32", "int8"), batches=(8,), num_images=20, num_rounds=1,
            device="cpu", round_images=16,
            overrides=("model.hidden_units=256", "preprocessing.resize_px=73", "preprocessing.crop_px=64"),
        )  # fmt: skip


@pytest.mark.slow
def test_bench_infer_reports_rates_with_accuracy(report: Report) -> None:
    rows = {row["case"]: row for row in report["rows"]}
    assert [*rows] == [
        *(f"paper {name} batch 8" for name in ("fp32", "int8", "plain")),
        *("help", "import_click", "first_row", "session"),
    ]
    exported = [rows["paper fp32 batch 8"], rows["paper int8 batch 8"]]
    for row in exported:
        assert "CPUExecutionProvider" in row["provider"] and row["device"] == "cpu"
        assert all(row[phase] > 0 for phase in PHASES) and row["copy"] > row["model"]
        assert (
            row["model_ms"] <= row["model_p99_ms"] and row["files_to_rows_ms"] <= row["files_to_rows_p99_ms"]
        )
        assert row["accuracy"] >= 0.95 and row["top1_agreement"] >= 0.99 and row["failure"] is None
    fp32, int8 = (row["model"] for row in exported)
    assert report["ratios"]["int8_vs_fp32"] == pytest.approx(int8 / fp32, rel=1e-2)
    plain = rows["paper plain batch 8"]
    assert plain["provider"].startswith("torch ") and "model" not in plain
    assert report["ratios"]["vs_plain_loop"] == pytest.approx(
        rows["paper fp32 batch 8"]["end_to_end"] / plain["end_to_end"], rel=1e-2
    )


@pytest.mark.slow
def test_bench_infer_has_every_promised_ratio(report: Report) -> None:
    promised = {
        "end_to_end_vs_bound", "vs_plain_loop", "int8_vs_fp32", "first_row_vs_session", "help_vs_click",
    }  # fmt: skip
    assert promised <= set(report["ratios"]) and all(report["ratios"][name] for name in promised)
    assert msgspec.json.decode(msgspec.json.encode(report)) == report
    text = "\n".join(describe(report))
    assert "paper int8 batch 8 " in text and "vs_plain_loop" in text


def test_ratios_are_those_of_the_worse_network() -> None:
    bench = Bench()
    for model, speed in (("owt", 6.0), ("paper", 4.0)):
        for batch in (1, 32):
            figures = {"end_to_end": [speed * batch], "model": [speed], "vs_bound": [speed / 8]}
            bench.rounds[f"{model} fp32 batch {batch}"] = figures
            bench.rounds[f"{model} plain batch {batch}"] = {"end_to_end": [2.0 * batch**2]}
    bench.rounds["owt int8 batch 32"] = {"model": [18.0]}
    bench.rounds |= {"first_row": {"seconds": [3.0]}, "session": {"seconds": [2.0]}}
    assert make_ratios(bench, ("owt", "paper"), "fp32", (1, 32)) == {
        "end_to_end_vs_bound": 0.5,
        "vs_plain_loop": 4 / 64,
        "vs_plain_loop_at_its_best_batch": 4 / 64,
        "int8_vs_fp32": 3.0,
        "int8_vs_fp32_owt": 3.0,
        "int8_vs_fp32_paper": None,
        "first_row_vs_session": 1.5,
        "help_vs_click": None,
    }
