"""`alexnet predict --features` and `alexnet search`: the whole way, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from data_pipeline.common.errors import UserError
from infer.bundle.load import Bundle
from infer.bundle.manifest import read_digest
from infer.predict.rows import ErrorRow, FeatureRow
from infer.predictor import Predictor
from infer.search.images import find_nearest
from infer.search.read import Block
from tests.helpers.command_line import assert_one_line, invoke
from tests.helpers.infer_samples import edit_manifest


@pytest.fixture
def written(featured: Bundle, files: list[Path], tmp_path: Path) -> list[Path]:
    """The features of ten images and a file that is none, as Parquet and as `.npy`."""
    (tmp_path / "none.jpg").write_bytes(b"hello")
    outputs = [tmp_path / "F.parquet", tmp_path / "F.npy"]
    listed = (*files[:4], tmp_path / "none.jpg", *files[4:])
    for output in outputs:
        options = ("--model", featured.folder, "--device", "cpu", "--decoder", "pillow", "--batch-size", "4")
        done = invoke("predict", *listed, *options, "--features", "fc7", "--output", output)
        assert done.exit_code == 3 and "11 images, 1 of them could not be read" in done.stderr, done.output
    return outputs


@pytest.mark.slow
def test_features_are_written_and_searched(
    featured: Bundle, files: list[Path], written: list[Path], tmp_path: Path
) -> None:
    parquet, npy = written
    settings = {"device": "cpu", "decoder": "pillow", "batch_size": 4}
    with Predictor(featured, features="fc7", **settings) as predictor:  # type: ignore[arg-type]
        rows = list(predictor([*files[:4], tmp_path / "none.jpg", *files[4:]]))
        with Predictor(featured, **settings) as plain:  # type: ignore[arg-type]
            classes = [row.predictions for row in plain(files) if row.status == "ok"]
    assert [row.predictions for row in rows if isinstance(row, FeatureRow)] == classes
    right = np.stack([row.features for row in rows if isinstance(row, FeatureRow)])
    assert right.dtype == np.float32 and right.shape == (10, 64) and right.max() > 0
    table = pyarrow.parquet.read_table(parquet)
    assert table["path"].to_pylist() == [row.path for row in rows]
    assert table["status"].to_pylist() == [row.status for row in rows]
    assert isinstance(rows[4], ErrorRow) and table["error"].to_pylist()[4] == rows[4].error
    found = table["features"].to_pylist()
    assert found.pop(4) is None and np.array_equal(np.array(found, np.float32), right)
    array = np.load(npy)
    assert array.shape == (11, 64) and np.isnan(array[4]).all()
    assert np.array_equal(np.delete(array, 4, axis=0), right)
    about = json.loads((tmp_path / "F.npy.json").read_bytes())
    assert about == json.loads(table.schema.metadata[b"alexnet_features"])
    assert (about["layer"], about["network"], about["num_features"]) == ("fc7", "paper", 64)
    assert about["bundle_sha256"] == read_digest(featured.folder)
    lines = [json.loads(line) for line in (tmp_path / "F.npy.rows.jsonl").read_bytes().splitlines()]
    assert [line["path"] for line in lines] == table["path"].to_pylist() and lines[4]["status"] == "error"
    assert not list(tmp_path.glob(".*")), "nothing is left beside the files"

    unit = right.astype(np.float64) / np.linalg.norm(right.astype(np.float64), axis=1, keepdims=True)
    expected = np.argsort(-(unit @ unit[7]).astype(np.float32), kind="stable")[:3]
    for file in written:
        done = invoke("search", files[7], "--in", file, "--model", featured.folder, "--top", "3", "--json")
        result = json.loads(done.stdout)
        assert (result["similarity"], result["num_images"], result["num_unreadable"]) == ("cosine", 10, 1)
        nearest = result["queries"][0]["nearest"]
        assert [one["path"] for one in nearest] == [str(files[i]) for i in expected]
        assert nearest[0]["similarity"] == pytest.approx(1) and nearest[0]["row"] == 8
    text = invoke("search", files[7], "--in", npy, "--model", featured.folder).stdout.splitlines()
    assert text[0] == "cosine similarity of fc7 (paper) to 10 images (1 more could not be read)"
    assert text[2] == f"   1.0000  {files[7]}" and len(text) == 7


@pytest.mark.slow
def test_features_of_another_model_are_refused(
    bundle: Bundle, featured: Bundle, files: list[Path], written: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    search = ("search", files[0], "--in", written[0])
    refused = assert_one_line(invoke(*search), 2, "which is not under runs/: name it with --model")
    assert read_digest(featured.folder)[:12] in refused
    assert_one_line(invoke(*search, "--model", bundle.folder), 2, "is another: name that one with --model")
    place = tmp_path / "runs" / "some" / "export"
    for name in ("a", "b"):
        shutil.copytree(featured.folder, place / name)
    edit_manifest(place / "a", created="2026-01-02T03:04:05.000000+00:00")
    (place / "damaged").mkdir()
    (place / "damaged" / "bundle.json").write_bytes(b"{")
    done = invoke(*search)
    assert done.exit_code == 0 and f"model: {Path('runs/some/export/b')}" in done.stderr, done.output


@pytest.mark.slow
def test_damaged_files_of_features_are_one_line(
    featured: Bundle, files: list[Path], written: list[Path], tmp_path: Path
) -> None:
    def refuse(words: str, query: Path, file: Path) -> None:
        done = invoke("search", query, "--in", file, "--model", featured.folder, "--top", "2")
        assert_one_line(done, 2, words)

    parquet, npy = written
    refuse("none.jpg cannot be read: not an image", tmp_path / "none.jpg", parquet)
    refuse("there is no such file", files[0], tmp_path / "gone.npy")
    content = parquet.read_bytes()
    for size in (0, 40, len(content) - 5):
        parquet.write_bytes(content[:size])
        refuse("is no whole file of `alexnet predict --features`", files[0], parquet)
    parquet.write_bytes(content[:100] + bytes(2000) + content[2100:])
    refuse("is no whole file of `alexnet predict --features`", files[0], parquet)
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a"]}), parquet)
    refuse("is no whole file of `alexnet predict --features`", files[0], parquet)
    content = npy.read_bytes()
    for size in (0, 60, len(content) - 1):
        npy.write_bytes(content[:size])
        refuse("F.npy is no whole file of", files[0], npy)
    np.save(npy, np.zeros((11, 63), np.float32))
    refuse("float32 of shape (11, 63)", files[0], npy)
    npy.write_bytes(content)
    (tmp_path / "F.npy.rows.jsonl").write_bytes(b"")
    refuse("it has no row", files[0], npy)
    (tmp_path / "F.npy.json").unlink()
    refuse("F.npy.json is no whole file of", files[0], npy)


@pytest.mark.slow
def test_predict_writes_features_only_as_asked(
    bundle: Bundle, featured: Bundle, files: list[Path], written: list[Path], tmp_path: Path
) -> None:
    def predict(model: Bundle, output: str, *options: str) -> str:
        done = invoke(
            "predict",
            files[0],
            "--model",
            model.folder,
            "--device",
            "cpu",
            "--output",
            tmp_path / output,
            *options,
        )
        return assert_one_line(done, 2, "")

    fc7 = ("--features", "fc7")
    assert "export it with `alexnet export --features fc7`" in predict(bundle, "n.npy", *fc7)
    assert "gives features of fc7 and not of fc6" in predict(featured, "n.npy", "--features", "fc6")
    assert "'fc9' is not one of" in predict(featured, "n.npy", "--features", "fc9")
    assert "--output FILE.parquet or FILE.npy" in predict(featured, "n.csv", *fc7)
    for option in (("--resume",), ("--top", "3"), ("--format", "parquet"), ("--engine", "ray")):
        assert f"{' '.join(option[:1])}" in predict(featured, "n.npy", *fc7, *option)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for output in ("F.npy", "F.parquet"):
        assert "has features of an earlier run: --overwrite replaces them" in predict(featured, output, *fc7)
    assert "is not rows of predictions" in predict(featured, "F.parquet")
    (tmp_path / "mine.npy").write_bytes(b"\x93NUMPY of my own")
    assert "exists and is not features" in predict(featured, "mine.npy", *fc7)
    (tmp_path / "mine.npy").unlink()
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    replaced = ("--device", "cpu", *fc7, "--overwrite", "--output", tmp_path / "F.npy")
    assert invoke("predict", *files[:2], "--model", featured.folder, *replaced).exit_code == 0
    assert np.load(tmp_path / "F.npy").shape == (2, 64)
    strict = ("--device", "cpu", *fc7, "--strict", "--output", tmp_path / "s.npy")
    done = invoke("predict", tmp_path / "none.jpg", "--model", featured.folder, *strict)
    assert done.exit_code == 1 and not list(tmp_path.glob("*s.npy*"))
    with pytest.raises(UserError, match="--features fc9: fc7, fc6, pool5"):
        Predictor(featured, features="fc9")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_nearest_rows_are_those_of_a_brute_force(size: int) -> None:
    random = np.random.default_rng(0)
    rows = np.maximum(random.normal(size=(60, 16)), 0).astype(np.float32)
    rows[[3, 40, 59]] = rows[17]  # equal rows, in several blocks and places
    rows[5], rows[23] = np.nan, 0
    queries = np.stack([rows[17] * 2, random.random(16, np.float32)])
    found = find_nearest(queries, [Block(at, rows[at : at + size]) for at in range(0, 60, size)], 6)
    cosines = np.array([
        [-2 if i == 5 else 0 if i == 23 else float(np.dot(q, r) / np.linalg.norm(q) / np.linalg.norm(r))
         for i, r in enumerate(rows.astype(np.float64))] for q in queries.astype(np.float64)
    ])  # fmt: skip
    expected = np.argsort(-cosines.astype(np.float32), axis=1, kind="stable")[:, :6]
    assert found.rows.tolist() == expected.tolist()
    assert found.rows[0, :4].tolist() == [3, 17, 40, 59] and found.similarities[0, 3] == 1
    np.testing.assert_allclose(found.similarities, np.take_along_axis(cosines, expected, 1), atol=1e-6)
    assert (found.num_rows, found.num_unreadable) == (59, 1)


def test_fewer_rows_than_asked_for_are_all_there_are() -> None:
    rows = np.array([[0, 0], [1, 0], [1, 1]], np.float32)
    found = find_nearest(np.array([[0, 2]], np.float32), [Block(0, rows)], 5)
    assert found.rows.tolist() == [[2, 0, 1]] and found.similarities[0].tolist() == pytest.approx(
        [2**-0.5, 0, 0]
    )
    assert find_nearest(np.ones((1, 2), np.float32), [], 5).rows.shape == (1, 0)
