"""Prediction: one row for each input, in order; and numbers equal to the checkpoint's."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from data_pipeline.common.errors import UserError
from infer.bundle.load import Bundle
from infer.export.gate import torch_runner
from infer.predict.decode import DecoderName
from infer.predict.rows import ClassNames, ErrorRow, OkRow, Row, top_k
from infer.predict.table import RowCounter
from infer.predict.writers import JsonlWriter
from infer.predictor import Predictor
from infer.runtime.onnx import OnnxBackend
from tests.helpers.infer_samples import CLASSES, checkpoint_folder, data_folder, images_in
from train.checkpoints.load import load_checkpoint


def write_jsonl(rows: Iterable[Row], stream: io.BytesIO) -> None:
    writer = JsonlWriter(stream)
    for row in rows:
        writer.write(row)


@pytest.fixture(scope="session")
def predictor(bundle: Bundle) -> Iterator[Predictor]:
    with Predictor(bundle, backend="onnx", device="cpu", batch_size=8) as predictor:
        yield predictor


@pytest.fixture(scope="session")
def backend(bundle: Bundle) -> OnnxBackend:
    return OnnxBackend(bundle, "cpu")


@pytest.fixture
def inputs(base: Path, tmp_path: Path) -> list[Path]:
    """Eleven files: good ones, and a truncated, an empty, a missing and a text one among them."""
    good = images_in(data_folder(base) / "val")[::7]
    assert len(good) == 8
    whole = good[0].read_bytes()
    bad = {"truncated.jpg": whole[: len(whole) // 2], "empty.png": b"", "text.jpg": b"hello"}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    names = [*good[:1], tmp_path / "truncated.jpg", *good[1:5], tmp_path / "empty.png", tmp_path / "gone.jpg"]
    return [*names, *good[5:], tmp_path / "text.jpg"]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("decoder", ["auto", "pillow"])
def test_predict_gives_one_row_for_each_input_in_order(
    bundle: Bundle, inputs: list[Path], batch_size: int, decoder: DecoderName
) -> None:
    with Predictor(bundle, backend="onnx", device="cpu", batch_size=batch_size, decoder=decoder) as predictor:
        rows = list(predictor(inputs))
    assert [row.path for row in rows] == [str(path) for path in inputs]
    failed = [row for row in rows if isinstance(row, ErrorRow)]
    assert [Path(row.path).name for row in failed] == ["truncated.jpg", "empty.png", "gone.jpg", "text.jpg"]
    for error_row, words in zip(failed, ("truncated", "empty", "No such file", "not an image"), strict=True):
        assert words in error_row.error
    for row in rows:
        if isinstance(row, OkRow):
            found = [p.probability for p in row.predictions]
            assert len(found) == 5 and found == sorted(found, reverse=True)
            assert all(CLASSES[p.class_id] == p.label for p in row.predictions)


@pytest.mark.usefixtures("thin")
def test_predict_rows_are_the_checkpoints_predictions(base: Path, bundle: Bundle, inputs: list[Path]) -> None:
    run = torch_runner(load_checkpoint(checkpoint_folder(base)))
    good = [path for path in inputs if "val" in path.parts]
    with Predictor(bundle, device="cpu", top=1, decoder="pillow", batch_size=4) as predictor:
        rows = list(predictor(good))
    from PIL import Image

    for path, row in zip(good, rows, strict=True):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))[4:60, 4:60]  # 64 pixels: no resize, the centre 56
        expected = run(np.ascontiguousarray(pixels)[None])[0]
        assert isinstance(row, OkRow)
        assert row.predictions[0].class_id == expected.argmax()
        assert row.predictions[0].probability == pytest.approx(float(expected.max()), abs=1e-4)


def test_predict_streams_rows_and_reads_inputs_lazily(base: Path, bundle: Bundle) -> None:
    image = images_in(data_folder(base) / "val")[0]
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield image

    with Predictor(bundle, device="cpu", batch_size=4) as predictor:
        rows = predictor(endless())
        assert isinstance(next(rows), OkRow)
        assert taken < 100
        rows.close()  # type: ignore[attr-defined]


def test_predict_checks_arguments_before_the_first_row(
    bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    for top in (0, 11):
        with pytest.raises(UserError, match=r"the model has 10 classes; use 1 to 10"):
            Predictor(bundle, top=top)
    with pytest.raises(UserError, match="at least 1"):
        Predictor(bundle, batch_size=0)
    Predictor(bundle, device="cpu", batch_size=100).close()
    assert caplog.messages == ["batches of 8 instead of 100: the model was exported for no more"]


def test_file_names_survive_json(base: Path, tmp_path: Path, predictor: Predictor) -> None:
    image = images_in(data_folder(base) / "val")[0]
    names = [b"caf\xe9.jpg", "größe 数.jpg".encode(), b'quo"te\n.jpg', b"-dash.jpg"]
    paths = [Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)) for name in names]
    for path in paths:
        shutil.copy(image, path)
    stream = io.BytesIO()
    write_jsonl(predictor(paths), stream)
    lines = stream.getvalue().decode("utf-8", "strict").splitlines()
    rows = [json.loads(line) for line in lines]
    found = [row["path"].rpartition("/")[2] for row in rows]
    assert found == ["caf\\xe9.jpg", "größe 数.jpg", 'quo"te\n.jpg', "-dash.jpg"]
    assert list(rows[0]) == ["path", "status", "predictions"]
    assert rows[0]["status"] == "ok" and list(rows[0]["predictions"][0]) == [
        "class_id",
        "label",
        "probability",
    ]


def test_error_row_in_json_has_the_reason(predictor: Predictor, tmp_path: Path) -> None:
    stream = io.BytesIO()
    write_jsonl(predictor(tmp_path / "gone.jpg"), stream)
    row = json.loads(stream.getvalue())
    assert row == {"path": str(tmp_path / "gone.jpg"), "status": "error", "error": row["error"]}
    assert "No such file" in row["error"]


def test_top_k_ranks_equal_probabilities_by_class() -> None:
    (row,) = top_k(np.array([[0.2, 0.4, 0.4]], np.float32), ClassNames(("a", "b", "c")), 3)
    assert [p.label for p in row] == ["b", "c", "a"]


def test_summary_says_what_ran(predictor: Predictor, inputs: list[Path]) -> None:
    backend = predictor.backend
    counter = RowCounter(backend, load_s=100.0)
    rows = list(counter.count(predictor.rows(inputs)))
    summary = counter.summary()
    assert 100 < summary.start_s <= 100 + summary.seconds
    assert f"; the start took {summary.start_s:.1f} s" in summary.sentence()
    assert (summary.images, summary.errors) == (len(rows), 4) == (12, 4)
    assert (summary.backend, summary.device, summary.precision) == ("onnx", "cpu", "fp32")
    assert summary.images_per_s == pytest.approx(12 / summary.seconds)
    assert "12 images, 4 of them could not be read" in summary.sentence()
    assert "CPUExecutionProvider, fp32, on cpu" in summary.sentence()
    assert RowCounter(backend).summary().images_per_s == 0
    assert json.loads(msgspec.json.encode(summary))["provider"] == backend.provider


def test_prediction_imports_neither_torch_nor_train(tmp_path: Path) -> None:
    code = (
        "import sys, infer.predict.rows, infer.predict.table, infer.runtime.choose, infer.bundle.load\n"
        "import infer.evaluate\n"
        "heavy = {'torch', 'torchvision', 'train', 'onnx', 'onnxruntime', 'nvidia', 'tensorrt',"
        " 'tensorrt_rtx', 'rich', 'PIL.Image'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(json.loads(done.stdout.replace("'", '"'))) <= {"PIL.Image"}


def test_prediction_runs_without_torch_and_train(base: Path, bundle: Bundle) -> None:
    code = """
import sys
from pathlib import Path
for name in ("torch", "torchvision", "train", "onnx", "onnxscript", "nvidia"):
    sys.modules[name] = None  # importing it fails, as where it is not installed
from alexnet import Predictor, find_inputs, load_bundle
from infer.predict.writers import JsonlWriter as Writer
with Predictor(load_bundle(Path(sys.argv[1]))) as predictor:
    print(predictor.runs_on, file=sys.stderr)
    writer = Writer(sys.stdout.buffer)
    for row in predictor(list(find_inputs([sys.argv[2]]))[:3]):
        writer.write(row)
"""
    arguments = [sys.executable, "-c", code, str(bundle.folder), str(data_folder(base) / "val")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["ok"] * 3
    assert "ONNX Runtime" in done.stderr


def test_bad_files_are_rows_and_not_log_lines(
    predictor: Predictor, inputs: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        list(predictor(inputs))
    assert not [message for message in caplog.messages if "left out" in message]
