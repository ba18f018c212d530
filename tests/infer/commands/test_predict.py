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
import torch
from rich.console import Console

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import visible
from data_pipeline.datasets.image_folder import load_image_folder
from infer.bundle.load import Bundle
from infer.evaluate import evaluate_bundle
from infer.export.gate import torch_runner
from infer.predict.decode import DecoderName, open_decoder, valid_images
from infer.predict.rows import ErrorRow, OkRow, Prediction, Row, top_k
from infer.predict.table import RowCounter, TableWriter, layout
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
    (row,) = top_k(np.array([[0.2, 0.4, 0.4]], np.float32), ("a", "b", "c"), 3)
    assert [p.label for p in row] == ["b", "c", "a"]


ROWS: list[Row] = [
    OkRow(
        path="photos/holiday/2024/one.jpg",
        predictions=(
            Prediction(class_id=0, label="[bold]a very long label indeed", probability=0.987),
            Prediction(class_id=1, label="\x1b[31mred\u202e", probability=0.0126),
        ),
    ),
    ErrorRow(path="photos/[red]two\n.jpg", error="truncated JPEG: \x07 " + "and a long reason " * 5),
    OkRow(path="数.jpg", predictions=(Prediction(class_id=2, label="猫", probability=1.0),)),
]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_table_escapes_and_cuts_but_keeps_the_reason(width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    writer = TableWriter(console, 2)
    for row in ROWS:
        writer.write(row)
    text = stream.getvalue()
    header, first, error, last = text.splitlines()
    assert header.split() == ["image", "#1", "#2"]
    for control in ("\x1b", "\x07", "\u202e", "\r"):
        assert control not in text
    assert "[bold]"[: width // 20] in first and "98.7%" in first and "1.3%" in first and "100.0%" in last
    assert "2024/one.jpg" in first and len(first) <= width
    assert "photos/[red]two\\n.jpg" in error and error.count("and a long reason") == 5 and "\\x07" in error
    assert visible("plain ü 数") == "plain ü 数"


def test_table_shows_fewer_classes_on_narrow_terminals() -> None:
    assert [layout(width, 5)[2] for width in (20, 40, 60, 80)] == [1, 2, 3, 5]
    for width in (40, 80, 100, 200):
        path, cell, shown = layout(width, 5)
        assert path + shown * (cell + 2) <= width


def test_summary_says_what_ran(predictor: Predictor, inputs: list[Path]) -> None:
    backend = predictor.backend
    counter = RowCounter(backend)
    rows = list(counter.count(predictor.rows(inputs)))
    summary = counter.summary()
    assert (summary.images, summary.errors) == (len(rows), 4) == (12, 4)
    assert (summary.backend, summary.device, summary.precision) == ("onnx", "cpu", "fp32")
    assert summary.images_per_s == pytest.approx(12 / summary.seconds)
    assert "12 images, 4 of them could not be read" in summary.sentence()
    assert "CPUExecutionProvider, fp32, on cpu" in summary.sentence()
    assert RowCounter(backend).summary().images_per_s == 0
    assert json.loads(msgspec.json.encode(summary))["provider"] == backend.provider


@pytest.mark.parametrize("batch_size", [7, 8])
def test_bundle_scores_as_the_checkpoint(
    base: Path, bundle: Bundle, backend: OnnxBackend, batch_size: int
) -> None:
    checkpoint = load_checkpoint(checkpoint_folder(base))
    dataset = load_image_folder(data_folder(base), "val")
    run, num_top1, num_top5, losses = torch_runner(checkpoint), 0, 0, []
    from data_pipeline.loader import Loader

    with open_decoder(checkpoint.preprocessing, 8) as decoder:
        for batch in Loader(decoder, checkpoint.preprocessing).eval(dataset, micro_batch=8):
            probabilities = torch.from_numpy(run(valid_images(batch)))
            hits = probabilities.topk(5).indices == torch.from_numpy(batch.labels)[:, None]
            num_top1, num_top5 = num_top1 + int(hits[:, 0].sum()), num_top5 + int(hits.sum())
            losses += (-probabilities[range(len(batch)), batch.labels].double().log()).tolist()
    found = evaluate_bundle(bundle, backend, dataset, batch_size=batch_size)
    assert (found.num_samples, found.num_failed) == (50, 0)
    assert (found.top1, found.top5) == (num_top1 / 50, num_top5 / 50)
    assert 0 < found.top5 < 1
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-4)


def test_evaluation_counts_what_it_could_not_read(
    base: Path, tmp_path: Path, bundle: Bundle, backend: OnnxBackend
) -> None:
    shutil.copytree(data_folder(base), tmp_path / "data")
    whole = evaluate_bundle(bundle, backend, load_image_folder(tmp_path / "data", "val"))
    victim = sorted((tmp_path / "data" / "val" / "4").iterdir())[0]
    victim.write_bytes(b"no image")
    with_fault = evaluate_bundle(bundle, backend, load_image_folder(tmp_path / "data", "val"))
    assert (with_fault.num_samples, with_fault.num_failed) == (49, 1)
    lost = round(whole.top5 * 50) - round(with_fault.top5 * 49)
    assert lost in (0, 1) and with_fault.top5 * 49 == pytest.approx(round(with_fault.top5 * 49))
    shutil.rmtree(tmp_path / "data" / "val" / "9")
    with pytest.raises(UserError, match=r"other classes than the model \(9 and 10\)"):
        evaluate_bundle(bundle, backend, load_image_folder(tmp_path / "data", "val"))


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
