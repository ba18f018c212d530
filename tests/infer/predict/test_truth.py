"""True classes of the inputs: by folder and from files, in every format of rows, and what is refused."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet
import pytest

from data_pipeline.common.errors import UserError
from infer.bundle.load import Bundle
from infer.commands.run_predict import run_predict
from infer.predict.inputs import find_inputs
from infer.predict.options import PredictOptions, rows_format
from infer.predict.rows import rank_classes, rank_of
from infer.predict.truth import class_folder, class_ids, open_truth, read_truth
from infer.predict.writers import Format
from tests.helpers.infer_samples import data_folder, images_in

IDS = {"cat": 0, "dog": 1, "red fox": 2}


def predict(bundle: Bundle, data: Path, output: Path, **options: Any) -> str:
    """Write rows; returns the accuracy in words."""
    given = PredictOptions(paths=[str(data)], output=output, device="cpu", decoder="pillow", **options)
    accuracy = run_predict(given, lambda: bundle).accuracy
    return accuracy or ""


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


def csv_rows(path: Path) -> list[dict[str, Any]]:
    names = ("class_id", "label", "rank")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    truths = [{name: row[f"truth_{name}"] for name in names} for row in rows]
    return [
        {"path": row["path"], "truth": {**t, "class_id": int(t["class_id"]), "rank": int(t["rank"])}}
        for row, t in zip(rows, truths, strict=True)
    ]


READERS: dict[Format, Callable[[Path], list[dict[str, Any]]]] = {
    "jsonl": jsonl,
    "csv": csv_rows,
    "parquet": lambda path: pyarrow.parquet.read_table(path).to_pylist(),
}


@pytest.fixture(scope="module")
def expected(bundle: Bundle, base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Rows without truth, of all ten classes, in the order of the probabilities."""
    path = tmp_path_factory.mktemp("expected") / "rows.jsonl"
    assert predict(bundle, data_folder(base) / "val", path, top=10) == ""
    assert b"truth" not in path.read_bytes()
    return jsonl(path)


def accuracy_of(rows: list[dict[str, Any]]) -> tuple[list[int], str]:
    """The rank of each row's folder, and the accuracy in words."""
    labels = [[p["label"] for p in row["predictions"]] for row in rows]
    names = [Path(row["path"]).parent.name for row in rows]
    ranks = [found.index(name) + 1 for found, name in zip(labels, names, strict=True)]
    top1, top5 = np.mean(np.array(ranks) == 1), np.mean(np.array(ranks) <= 5)
    return ranks, f"top-1 {top1:.2%}, top-5 {top5:.2%} of {len(rows)} images with a truth"


@pytest.mark.slow
@pytest.mark.parametrize("format", READERS)
def test_rows_have_their_truth_in_every_format(
    format: Format, bundle: Bundle, base: Path, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The rank is that among all classes, though a row has only two of them; a resumed run counts all."""
    data, output = data_folder(base) / "val", tmp_path / f"rows.{format}"
    ranks, accuracy = accuracy_of(expected)
    assert len(set(ranks)) > 1 and max(ranks) > 2
    assert predict(bundle, data, output, top=2, truth="folder") == accuracy
    rows = READERS[format](output)
    assert [row["path"] for row in rows] == [row["path"] for row in expected]
    names = [Path(row["path"]).parent.name for row in rows]
    assert [row["truth"] for row in rows] == [
        {"class_id": int(name), "label": name, "rank": rank} for name, rank in zip(names, ranks, strict=True)
    ]
    assert rows_format(output) == format
    if format != "parquet":
        whole = output.read_bytes()
        output.write_bytes(b"".join(whole.splitlines(keepends=True)[:20]))
        assert predict(bundle, data, output, top=2, truth="folder", resume=True) == accuracy
        assert output.read_bytes() == whole
    with pytest.raises(
        UserError, match="begun with truth folder, and now it is none: give --truth as it was"
    ):
        predict(bundle, data, output, top=2, resume=True)


def test_table_and_gallery_show_the_truth(bundle: Bundle, base: Path, tmp_path: Path) -> None:
    image = images_in(data_folder(base) / "val" / "7")[0]
    predict(bundle, image, tmp_path / "rows.txt", truth="folder", html=tmp_path / "page.html", top=3)
    header, line = (tmp_path / "rows.txt").read_text().splitlines()
    assert header.split()[-2:] == ["#3", "truth"]
    assert line.split()[-1] == "7" and rows_format(tmp_path / "rows.txt") == "table"
    assert "<div>truth: 7" in (tmp_path / "page.html").read_text()


def test_file_names_inputs_by_any_end_of_their_path(
    bundle: Bundle,
    base: Path,
    expected: list[dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = data_folder(base) / "val"
    paths = [Path(row["path"]) for row in expected]
    shown = [str(paths[0]), f"./{paths[1].parent.name}/{paths[1].name}", paths[2].name, "gone.jpg"]
    lines = [f"{path},{paths[0].parent.name}\n" for path in shown]
    (tmp_path / "truth.csv").write_text("path,class\n" + "".join(lines))
    with caplog.at_level(logging.INFO, "infer"):
        accuracy = predict(bundle, data, tmp_path / "rows.jsonl", truth=str(tmp_path / "truth.csv"))
    assert accuracy == accuracy_of(expected[:3])[1]
    assert f"--truth: 1 path(s) of {tmp_path}/truth.csv are no inputs" in caplog.messages
    assert ["truth" in row for row in jsonl(tmp_path / "rows.jsonl")] == [True] * 3 + [False] * 47


def test_folders_that_are_no_class_are_refused_before_the_work(bundle: Bundle, tmp_path: Path) -> None:
    for name in ("3", "x/images", "y", "z", "zz"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").touch()
    assert open_truth("folder", bundle, find_inputs([tmp_path / "3"])).class_at(tmp_path / "3" / "a.png") == 3
    with pytest.raises(UserError) as refused:
        open_truth("folder", bundle, find_inputs([tmp_path]))
    assert str(refused.value) == (
        "--truth folder: 4 name(s) are no class of the model (x, y, z and 1 more): name classes as the model "
        "does, such as 7, 8, 9"
    )


def test_ambiguous_labels_are_no_names(bundle: Bundle) -> None:
    labels = ("cat", "crane", "crane", *"def", "ghi", "jkl", "mno", "pqr")
    manifest = msgspec.structs.replace(bundle.manifest, labels_text=labels)
    ids = class_ids(Bundle(**{**vars(bundle), "manifest": manifest}))
    assert (ids["cat"], ids["0"], ids["9"], ids["pqr"], "crane" in ids) == (0, 0, 9, 9, False)


def test_rank_agrees_with_the_order_of_a_row() -> None:
    random = np.random.default_rng(0).integers(0, 4, (20, 9)).astype(np.float32)
    for row, order in zip(random, rank_classes(random, 9), strict=True):
        assert [rank_of(row, int(place)) for place in order] == list(range(1, 10))


def test_class_folder_is_above_images_as_in_tiny_imagenet() -> None:
    assert class_folder(Path("/d/train/n01/images/a.JPEG")) == "n01"
    assert class_folder(Path("/d/val/cat/a.jpg")) == "cat"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("path,class\na.jpg,cat\n\nb/./c.jpg, red fox \n", {"a.jpg": 0, "b/c.jpg": 2}),
        ("val_0.JPEG\tdog\t0\t32\t44\t62\nval_1.JPEG\tcat\t1\t1\t2\t2\n", {"val_0.JPEG": 1, "val_1.JPEG": 0}),
        ('\ufeff"a,b.jpg",dog\r\n', {"a,b.jpg": 1}),
    ],
)
def test_truth_is_read_from_csv_and_annotations(text: str, found: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "t").write_text(text, newline="")
    assert read_truth(tmp_path / "t", IDS) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "a,cow\nb,cat\nc,hen\n",
            "{0}: 2 name(s) are no class of the model (cow, hen): name classes as the model does, such as "
            "cat, dog, red fox",
        ),
        ("a,cat\nb\n", "{0} line 2 is no path and class: b"),
        ("a,cat\n./a,dog\n", "{0} line 2 has another class for a than before"),
        ("path,class\n", "{0} names no image: give it a path and a class a line, as a.jpg,cat"),
    ],
)
def test_truth_that_cannot_be_used_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(UserError) as refused:
        read_truth(tmp_path / "t", IDS)
    assert str(refused.value) == "--truth " + message.format(tmp_path / "t")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_truth(tmp_path / "nothing", IDS)
