"""The Python interface and the command built on it: arrays, Pillow images, shards, ten crops, going on."""

from __future__ import annotations

import io
import itertools
import json
import shutil
import tarfile
import threading
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image

from alexnet import main
from data_pipeline.common.errors import UserError
from data_pipeline.datasets.image_folder import load_image_folder
from data_pipeline.loader import Loader
from infer.bundle.load import Bundle
from infer.predict.decode import DecoderName, open_decoder, run_valid, valid_images
from infer.predict.inputs import find_inputs
from infer.predict.rows import ErrorRow, OkRow, Row
from infer.predictor import Predictor
from infer.runtime.base import Outputs
from infer.runtime.choose import BackendName, probe_machine, why_no_engine
from infer.runtime.onnx import OnnxBackend
from tests.helpers.images import broken, encode, kinds, photo, suffix_for
from tests.helpers.infer_samples import edit_manifest, images_in


def found(row: Row) -> list[tuple[int, float]]:
    assert isinstance(row, OkRow), row
    return [(p.class_id, p.probability) for p in row.predictions]


def test_predictor_takes_arrays_and_pillow_images_like_files(bundle: Bundle, files: list[Path]) -> None:
    opened = [Image.open(path) for path in files[:3]]
    arrays = [np.asarray(image.convert("RGB")) for image in opened]
    with Predictor(bundle.folder, device="cpu", batch_size=8, decoder="pillow") as predictor:
        expected = [found(row) for row in predictor(files[:3])]
        assert [found(row) for row in predictor([str(path) for path in files[:3]])] == expected
        assert [found(row) for row in predictor(arrays)] == expected
        assert [found(row) for row in predictor(opened)] == expected
        mixed = list(predictor([files[0], arrays[1], opened[2]]))
        assert [found(row) for row in mixed] == expected
        assert [row.path for row in mixed] == [str(files[0]), "<input 1>", "<input 2>"]
        (single,) = predictor(arrays[0])
        assert found(single) == expected[0]
    for image in opened:
        image.close()


@pytest.mark.parametrize("decoder", ["dali", "pillow"])
def test_predictor_calls_can_be_repeated_and_interleaved(
    bundle: Bundle, files: list[Path], decoder: DecoderName
) -> None:
    before = set(threading.enumerate())
    with Predictor(bundle.folder, device="cpu", batch_size=2, decoder=decoder, threads=1) as predictor:
        expected = [found(row) for row in predictor(files[:5])]
        first, second = predictor(files[:5]), predictor(files[2:5])
        mixed = [(found(next(first)), found(next(second))) for _ in range(3)]
        assert mixed == list(zip(expected[:3], expected[2:], strict=True))
        assert [found(row) for row in first] == expected[3:]
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) != before and time.monotonic() < deadline:
        time.sleep(0.01)  # `second` was not asked for the end of its rows: its thread is about to find it
    assert set(threading.enumerate()) == before, "closing ends the threads of the decoder"


def test_predictor_gives_error_rows_and_refuses_non_inputs(bundle: Bundle) -> None:
    bad: list[Any] = [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ]
    with Predictor(bundle.folder, device="cpu", batch_size=8) as predictor:
        rows = list(predictor(bad))
        assert all(isinstance(row, ErrorRow) for row in rows)
        assert "an array of float32 and shape (4, 4, 3): expected uint8" in rows[0].error  # type: ignore[union-attr]
        gray = np.full((70, 60), 200, np.uint8)
        (one, three) = predictor([gray, np.stack([gray] * 3, axis=2)])
        assert found(one) == found(three)
        with pytest.raises(TypeError, match="input 1 is a int: expected a path, a uint8 array or a Pillow"):
            list(predictor([gray, 7]))  # type: ignore[list-item]
    with pytest.raises(UserError, match="--min-probability 2: 0 to 1"):
        Predictor(bundle.folder, device="cpu", min_probability=2)("x.jpg")


def test_predictor_applies_exif_of_a_pillow_image(bundle: Bundle, files: list[Path], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(files[7]) as image:
        image.save(tmp_path / "turned.png", exif=exif)
    with Predictor(bundle.folder, device="cpu", decoder="pillow", batch_size=8) as predictor:
        with Image.open(tmp_path / "turned.png") as turned:
            plain, file, pillow = predictor([files[7], tmp_path / "turned.png", turned])
        assert found(file) == found(pillow) != found(plain)


def test_onnx_backend_reads_images_by_address(bundle: Bundle, files: list[Path]) -> None:
    backend = OnnxBackend(bundle, "cpu")
    images = np.random.default_rng(0).integers(0, 256, (5, 56, 56, 3)).astype(np.uint8)
    by_address = backend.run_at(images.ctypes.data, images.shape).probabilities
    assert by_address.shape == (5, 10) and np.array_equal(by_address, backend.run(images).probabilities)
    with pytest.raises(ValueError, match="a batch of 9; the model takes 1 to 8"):
        backend.run_at(images.ctypes.data, (9, 56, 56, 3))
    backend.close()


def test_ten_crop_averages_the_softmax_of_the_views(bundle: Bundle, files: list[Path]) -> None:
    dataset = load_image_folder(files[0].parents[2], "val")
    preprocessing = bundle.manifest.preprocessing
    with (
        Predictor(bundle.folder, device="cpu", batch_size=4, ten_crop=True, top=10) as predictor,
        open_decoder(preprocessing, 4) as decoder,
    ):
        batch = next(Loader(decoder, preprocessing).eval(dataset, micro_batch=4, ten_crop=True))
        views = valid_images(batch)
        each = [predictor.backend.run(views[:, v].copy()).probabilities for v in range(10)]
        expected = np.mean(each, axis=0)
        assert run_valid(predictor.backend, batch, 4).probabilities == pytest.approx(expected, abs=1e-6)
        rows = list(predictor([dataset.path_at(i) for i in range(4)]))
        for row, probabilities in zip(rows, expected, strict=True):
            assert dict(found(row)) == pytest.approx(dict(enumerate(probabilities.tolist())), abs=1e-6)
        first = next(predictor.rows(dataset.path_at(0), keep_pixels=True))
        assert first.pixels is not None and np.array_equal(first.pixels, views[0, 4])
        assert next(predictor.rows(dataset.path_at(0))).pixels is None


def invoke(*arguments: object, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(main, ["predict", *map(str, arguments)], input=stdin)


def rows_of(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.slow
def test_predictor_gives_the_same_rows_for_every_kind_of_input(
    bundle: Bundle, files: list[Path], tmp_path: Path
) -> None:
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    for number, file in enumerate(files[:4]):
        shutil.copy(file, images / ("deep" if number == 3 else "") / f"{3 - number}{file.suffix}")
    (images / "1.png").write_bytes(b"hello")
    paths = [str(path) for path in images_in(images)]
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for path in paths:
            tar.add(path, Path(path).name)
    (tmp_path / "list.txt").write_text("\n".join(paths))
    options = ("--model", bundle.folder, "--device", "cpu", "--format", "jsonl", "--batch-size", 3)
    expected = invoke(images, *options)
    assert expected.exit_code == 3 and "of them could not be read" in expected.stderr
    for argument, stdin in ((f"@{tmp_path}/list.txt", b""), ("-", "\0".join(paths).encode())):
        result = invoke(argument, *options, stdin=stdin)
        assert (result.exit_code, result.stdout) == (3, expected.stdout)
    shard = rows_of(invoke(tmp_path / "shard.tar", *options))
    assert [row.pop("path") for row in shard] == [f"{tmp_path}/shard.tar/{Path(p).name}" for p in paths]
    assert shard == [{k: v for k, v in row.items() if k != "path"} for row in rows_of(expected)]
    flat = rows_of(invoke(images, *options, "--no-recursive"))
    assert [row["path"] for row in flat] == [p for p in paths if "deep" not in p]
    likely = [
        row for row in rows_of(invoke(images, *options, "--min-probability", 0.5)) if row["status"] == "ok"
    ]
    assert all(p["probability"] >= 0.5 for row in likely for p in row["predictions"])
    assert {len(row["predictions"]) for row in likely} <= {0, 1}
    strict = invoke(images, *options, "--strict")
    bad = next(i for i, row in enumerate(rows_of(expected)) if row["status"] == "error")
    assert strict.exit_code == 1 and "not an image of a known format" in strict.stderr
    assert rows_of(strict) == rows_of(expected)[: bad + 1]
    nothing = invoke("-", *options)
    assert nothing.exit_code == 2 and "name no images" in nothing.stderr


@pytest.mark.slow
def test_predict_resume_completes_the_output(bundle: Bundle, files: list[Path], tmp_path: Path) -> None:
    listed = [*files[:3], tmp_path / "gone.jpg", *files[3:6]]
    (tmp_path / "list.txt").write_text("\n".join(map(str, listed)))
    options = (f"@{tmp_path}/list.txt", "--model", bundle.folder, "--device", "cpu", "--batch-size", 2)
    assert invoke(*options, "--output", tmp_path / "whole.jsonl").exit_code == 3
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_bytes(b"".join(lines[:5]) + lines[5][:20])
    result = invoke(*options, "--output", tmp_path / "part.jsonl", "--resume")
    assert result.exit_code == 3, result.stderr
    assert "5 rows are there already, 1 of them errors" in result.stderr
    assert "ended within a row" in result.stderr and "2 images after 5 of an earlier run" in result.stderr
    ours, theirs = ([json.loads(line) for line in text.splitlines()] for text in (
        (tmp_path / "part.jsonl").read_bytes(), whole))  # fmt: skip
    assert [row["path"] for row in ours] == [row["path"] for row in theirs] and ours[:6] == theirs[:6]
    shutil.copytree(bundle.folder, tmp_path / "other")
    edit_manifest(tmp_path / "other", created="2026-01-02T03:04:05.000000+00:00")  # else alike
    go_on = ("--output", tmp_path / "part.jsonl", "--resume")
    before = (tmp_path / "part.jsonl").read_bytes()
    for changed, words in {
        ("--model", tmp_path / "other"): "are of another model (its bundle.json has SHA-256 ",
        ("--model", bundle.folder, "--top", 3): "begun with top 5, and now it is 3",
        ("--model", bundle.folder, "--ten-crop"): "begun with ten_crop False, and now it is True",
    }.items():
        refused = invoke(options[0], *changed, "--device", "cpu", *go_on)
        assert refused.exit_code == 2 and words in refused.stderr
    assert (tmp_path / "part.jsonl").read_bytes() == before
    (tmp_path / ".part.jsonl.run.json").unlink()
    unknown = invoke(*options, *go_on)
    assert unknown.exit_code == 3 and "nobody knows whether the rows in" in unknown.stderr
    refused = invoke(files[1], "--model", bundle.folder, "--output", tmp_path / "part.jsonl", "--resume")
    assert refused.exit_code == 2 and "row 1 of" in refused.stderr and refused.stderr.count("\n") <= 5
    for wrong, words in {
        ("--resume",): "name it with --output",
        ("--resume", "--output", "rows.txt"): "a table cannot be read back",
        ("--format", "parquet"): "needs a file",
        ("--resume", "--output", "rows.csv", "--html", "x.html"): "a gallery shows one whole run",
    }.items():
        refused = invoke(*options, *wrong)
        assert refused.exit_code == 2 and words in refused.stderr


def test_predictor_takes_the_result_of_find_inputs(bundle: Bundle, files: list[Path]) -> None:
    buffer = io.BytesIO("\n".join(map(str, files[:2])).encode())
    with Predictor(bundle.folder, device="cpu", batch_size=8) as predictor:
        rows = list(predictor(find_inputs(["-"], stdin=buffer)))
        assert [row.path for row in rows] == [str(path) for path in files[:2]]


def files_of_every_kind(folder: Path) -> list[Path]:
    """Every kind of file that we promise to read, photos of many sizes, and files that are no whole image."""
    photos = {
        f"photo {i}": encode(photo(200 + 61 * i, 500 - 47 * i, i), "JPEG", quality=75) for i in range(6)
    }
    paths = []
    for number, content in enumerate((kinds() | photos | broken()).values()):
        paths.append(folder / f"{number:02d}{suffix_for(content)}")
        paths[-1].write_bytes(content)
    return paths


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_dali_and_pillow_give_the_same_rows(
    bundle: Bundle, tmp_path: Path, device: Literal["cpu", "cuda"]
) -> None:
    paths = files_of_every_kind(tmp_path)
    rows = {}
    for decoder in ("dali", "pillow"):
        with Predictor(bundle.folder, device=device, decoder=decoder, batch_size=8, top=10) as predictor:
            rows[decoder] = list(predictor(paths))
    errors = [row for row in rows["pillow"] if isinstance(row, ErrorRow)]
    assert len(rows["pillow"]) == len(paths) and len(errors) == len(broken())
    for one, other in zip(rows["dali"], rows["pillow"], strict=True):
        if isinstance(other, ErrorRow):
            assert one == other, "the same reason"
        else:
            assert dict(found(one)) == pytest.approx(dict(found(other)), abs=2e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["onnx", "trt"])
def test_predictor_on_a_gpu_reads_dalis_images_there(
    bundle: Bundle, tmp_path: Path, name: BackendName, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "trt" and (reason := why_no_engine(bundle, probe_machine())):
        pytest.skip(reason)
    paths = files_of_every_kind(tmp_path)
    with Predictor(bundle.folder, device="cpu", decoder="pillow", batch_size=8, top=10) as predictor:
        expected = list(predictor(paths))
    with Predictor(bundle.folder, backend=name, device="cuda", batch_size=8, top=10) as predictor:
        monkeypatch.setattr(predictor.backend, "run", None)  # what takes images from the host
        for one, other in zip(predictor(paths), expected, strict=True):
            if isinstance(other, OkRow):
                assert dict(found(one)) == pytest.approx(dict(found(other)), abs=2e-3)
            else:
                assert one == other


@pytest.mark.parametrize("decoder", ["dali", "pillow"])
def test_predictor_batches_are_full_but_the_last(
    bundle: Bundle, files: list[Path], decoder: DecoderName, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    run = OnnxBackend.run

    def watched(self: OnnxBackend, images_NHWC: NDArray[np.uint8], *, features: bool = False) -> Outputs:
        sizes.append(len(images_NHWC))
        return run(self, images_NHWC, features=features)

    monkeypatch.setattr(OnnxBackend, "run", watched)
    for batch_size, expected in ((4, [4, 4, 4, 4, 3]), (8, [8, 8, 3]), (1, [1] * 19)):
        sizes.clear()
        inputs = itertools.islice(itertools.cycle(files), 19)  # no length to look at
        how: Any = {"backend": "onnx", "device": "cpu", "decoder": decoder, "batch_size": batch_size}
        with Predictor(bundle, **how) as predictor:
            rows = list(predictor(inputs))
        assert len(rows) == 19 and sizes == expected
