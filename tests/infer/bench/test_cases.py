"""The cases of `alexnet bench infer`, with images on the CPU and, as far as code can see, on a GPU."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from infer.bench.cases import BundleCase, ProcessCase
from infer.bundle.load import Bundle
from tests.helpers.device_images import put_images_on_device
from tests.helpers.images import encode, photo

PHASES = ["decode", "preprocess", "copy", "model", "post", "end_to_end"]


@pytest.mark.slow
@pytest.mark.parametrize("on_device", [False, True])
def test_every_phase_runs_wherever_the_images_are(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(encode(photo(70, 90, number), "JPEG"))
    given = put_images_on_device(monkeypatch) if on_device else []
    with ExitStack() as stack:
        case = BundleCase(stack, bundle.folder, tmp_path, "cpu", 4)  # more than there are photographs
        assert case.facts()["device"] == "cpu" and case.facts()["precision"] == "fp32"
        figures = case.measure(12)
    assert [name for name in figures if name in PHASES] == PHASES and min(figures.values()) > 0
    assert figures["model_ms"] == pytest.approx(4e3 / figures["model"])
    assert figures["model_ms"] <= figures["model_p99_ms"]
    bound = 1 / (1 / figures["decode"] + 1 / figures["model"])
    assert figures["vs_bound"] == pytest.approx(figures["end_to_end"] / bound)
    assert bool(given) == on_device and any(images.num_copies for images in given) == on_device


def test_process_is_timed_to_its_end_and_must_succeed() -> None:
    with ExitStack() as stack:
        slow = ProcessCase(stack, "-c", "import time; print(flush=True); time.sleep(0.2)")
        assert 0.2 < slow.measure()["seconds"] < 60
        with pytest.raises(AssertionError):
            ProcessCase(stack, "-c", "raise SystemExit(1)").measure()


@pytest.mark.slow
def test_prediction_is_timed_to_its_first_row() -> None:
    script = """import time; print('{"path": 1}', flush=True); time.sleep(2)"""
    with ExitStack() as stack:
        assert ProcessCase(stack, "-c", script, "predict").measure()["seconds"] < 2
        with pytest.raises(AssertionError):
            ProcessCase(stack, "-c", "print('no row')", "predict").measure()
