"""`alexnet bench infer` on a few photographs: what it reports, and that it hangs together."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from infer.bench.predict import bench_infer, describe
from train.bench.harness import Report

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Small, and with int8, whose gate it has to pass."""
    folder: Path = tmp_path_factory.mktemp("bench") / "photos"
    return bench_infer(
        folder, models=("paper",), precisions=("fp32", "int8"), batches=(32,), num_images=40, num_rounds=1,
        device="cpu", round_images=64, overrides=("model.hidden_units=256",),
    )  # fmt: skip


def test_bench_infer_reports_rates_with_accuracy(report: Report) -> None:
    assert [(rate["model"], rate["precision"], rate["batch"]) for rate in report["rates"]] == [
        ("paper", "fp32", 32),
        ("paper", "int8", 32),
    ]
    for rate in report["rates"]:
        assert "CPUExecutionProvider" in rate["provider"] and rate["device"] == "cpu"
        assert set(rate["images_per_s"]) == {"decode", "preprocess", "copy", "model", "post", "end_to_end"}
        assert all(value > 0 for value in rate["images_per_s"].values())
        assert rate["images_per_s"]["copy"] > rate["images_per_s"]["model"]
        assert (
            rate["model_ms"][0] <= rate["model_ms"][1] and rate["one_batch_ms"][0] <= rate["one_batch_ms"][1]
        )
        assert rate["accuracy"] >= 0.95 and rate["top1_agreement"] >= 0.99
    fp32, int8 = (rate["images_per_s"]["model"] for rate in report["rates"])
    assert report["ratios"]["int8_vs_fp32"] == pytest.approx(int8 / fp32, rel=1e-2)


def test_bench_infer_has_every_promised_ratio(report: Report) -> None:
    promised = {
        "end_to_end_vs_bound",
        "vs_plain_loop",
        "int8_vs_fp32",
        "first_row_vs_session",
        "help_vs_click",
    }
    assert promised <= set(report["ratios"]) and all(report["ratios"][name] for name in promised)
    assert msgspec.json.decode(msgspec.json.encode(report)) == report
    text = "\n".join(describe(report))
    assert "paper int8     32" in text and "vs_plain_loop" in text
