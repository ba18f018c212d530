"""Images that lie on a GPU are read there, or copied once: on the CPU, by the code that a GPU runs."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.datasets.image_folder import load_image_folder
from infer.bundle.load import Bundle
from infer.evaluate import evaluate_bundle
from infer.predictor import Predictor
from infer.runtime.onnx import OnnxBackend
from tests.helpers.device_images import DeviceImages, put_images_on_device
from tests.helpers.infer_samples import data_folder


def test_device_images_refuse_numpy_as_a_gpus_do() -> None:
    images = DeviceImages(np.zeros((1, 2, 2, 3), np.uint8))
    with pytest.raises(BufferError, match="Unsupported device in DLTensor"):
        np.from_dlpack(images)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        np.asarray(images)


@pytest.mark.slow
@pytest.mark.parametrize("ten_crop", [False, True])
def test_rows_and_pixels_of_images_on_a_device(
    bundle: Bundle, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ten_crop: bool
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    inputs = [*files[:3], tmp_path / "bad.jpg", *files[3:]]
    with Predictor(bundle, device="cpu", batch_size=4, ten_crop=ten_crop) as predictor:
        expected = [(one.row, one.pixels.copy()) if one.pixels is not None else (one.row, None)
                    for one in predictor.rows(inputs, keep_pixels=True)]  # fmt: skip
        given = put_images_on_device(monkeypatch)
        monkeypatch.setattr(predictor.backend, "run", None)  # what takes images from the host
        found = list(predictor.rows(inputs))
        assert [one.row for one in found] == [row for row, _ in expected]
        assert not any(images.num_copies for images in given), "read in place"
        for one, (_, pixels) in zip(predictor.rows(inputs, keep_pixels=True), expected, strict=True):
            assert (one.pixels is None) == (pixels is None)
            if pixels is not None:
                np.testing.assert_array_equal(one.pixels, pixels)


def test_evaluation_of_images_on_a_device(
    base: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = load_image_folder(data_folder(base), "val")
    with closing(OnnxBackend(bundle, "cpu")) as backend:
        expected, _, report = evaluate_bundle(bundle, backend, dataset, batch_size=8)
        given = put_images_on_device(monkeypatch)
        found, _, same = evaluate_bundle(bundle, backend, dataset, batch_size=8)
        assert (found, same) == (expected, report)
    assert len(given) == 7
