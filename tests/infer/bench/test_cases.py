"""The cases of `alexnet bench infer`, with images on the CPU and, as far as code can see, on a GPU."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from infer.bench.cases import PHASES, BundleCase
from infer.bundle.load import Bundle
from tests.helpers.device_images import put_images_on_device
from tests.helpers.images import encode, photo


@pytest.mark.slow
@pytest.mark.parametrize("on_device", [False, True])
def test_every_phase_runs_wherever_the_images_are(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(encode(photo(70, 90, number), "JPEG"))
    given = put_images_on_device(monkeypatch) if on_device else []
    with ExitStack() as stack:
        case = BundleCase(stack, bundle.folder, tmp_path, "cpu")
        assert case.runs_on()["device"] == "cpu"
        for phase in PHASES:
            seconds = case.measure(phase, 2, 3)
            assert len(seconds) == (1 if phase in ("decode", "end_to_end") else 3) and min(seconds) > 0
    assert bool(given) == on_device and any(images.num_copies for images in given) == on_device
