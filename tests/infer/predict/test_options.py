"""Predict replaces no input and no file of others, and its own rows only when asked to."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import UserError
from infer.predict.gallery import GENERATOR
from infer.predict.inputs import find_inputs
from infer.predict.options import (
    PredictOptions,
    check_options,
    check_outputs,
    how_to_go_on,
    rows_format,
)
from infer.predict.rows import ClassNames, ErrorRow, OkRow, Prediction, Row, RowShape
from infer.predict.table import open_table
from infer.predict.writers import FileFormat, Format, journal_of, open_output

OK = OkRow(path="a,b.jpg", predictions=(Prediction(class_id=0, label="cat", probability=0.5),))
SHAPE = RowShape(1, named=False)
FAILED = ErrorRow(path="", error="empty file")
JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF\0" + bytes(range(256)) * 4


def write(format: Format, path: Path, row: Row = OK, shape: RowShape = SHAPE) -> None:
    assert format != "features"
    if format == "table":
        with open_table(path, ClassNames(("cat",), ("n1",) if shape.named else ()), 1) as table:
            table.write(row)
        return
    with open_output(format, path, shape, append=False, stdout=io.BytesIO()) as writer:
        writer.write(row)


def check(paths: list[Path | str], **options: Any) -> None:
    asked = PredictOptions(paths=[str(path) for path in paths], **options)
    check_outputs(asked, check_options(asked), find_inputs(asked.paths))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("0.jpg", "1.jpg"):
        (folder / name).write_bytes(JPEG)
    (tmp_path / "list.txt").write_text(f"{folder}/0.jpg\n")
    return folder


FORMATS: tuple[Format, ...] = ("jsonl", "csv", "parquet", "table")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("row", [OK, FAILED])
def test_rows_are_known_by_their_content(tmp_path: Path, format: Format, row: Row) -> None:
    for named in (False, True):
        write(format, tmp_path / "rows", row, RowShape(1, named))
        assert rows_format(tmp_path / "rows") == format


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_rows_cut_at_any_byte_are_still_rows(tmp_path: Path, format: FileFormat) -> None:
    path = tmp_path / "rows"
    write(format, path)
    whole = path.read_bytes()
    for size in range(1, len(whole) + 1):
        path.write_bytes(whole[:size])
        assert rows_format(path) == format, size


@pytest.mark.parametrize(
    "content",
    [
        JPEG, b"a.jpg\n", b"a.jpg", b"path,label\n", b'{"path": "a", "reason": "b"}\n', b"[1, 2]", b"PAR1",
        b'{"path":"a.jpg","status":"ok"}\n', b'{"schema": 1}\n', b"image, label\n", b"\n",
    ],
)  # fmt: skip
def test_other_files_are_no_rows(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert rows_format(tmp_path / "file") is None


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("format", ["jsonl", "csv", "parquet"])
def test_an_output_is_no_image_list_or_other_file(
    images: Path, tmp_path: Path, format: FileFormat, how: dict[str, bool]
) -> None:
    (tmp_path / "notes.txt").write_text("a line without an end")
    (tmp_path / "link").symlink_to(images / "1.jpg")
    os.link(tmp_path / "list.txt", tmp_path / "again.txt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    inputs: list[Path | str] = [images / "0.jpg", f"@{tmp_path}/list.txt"]
    for output, words in {
        images / "0.jpg": "is an input, or a list of inputs",
        images / ".." / "images" / "0.jpg": "is an input, or a list of inputs",
        images / "1.jpg": "exists and is not rows of predictions: name another file",
        tmp_path / "link": "exists and is not rows of predictions",
        tmp_path / "list.txt": "is an input, or a list of inputs",
        tmp_path / "again.txt": "is an input, or a list of inputs",
        tmp_path / "notes.txt": "exists and is not rows of predictions",
        images: "is a folder: name a file",
    }.items():
        with pytest.raises(UserError, match=f"--output .*{words}"):
            check(inputs, output=output, format=format, **how)
    with pytest.raises(UserError, match="link is an input"):
        check([images], output=tmp_path / "link", format=format, **how)
    assert {path: path.read_bytes() for path in before} == before


def test_a_shard_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "s.tar").touch()
    with pytest.raises(UserError, match=r"s.tar is an input"):
        check([tmp_path / "s.tar"], output=tmp_path / "s.tar")


@pytest.mark.parametrize("format", FORMATS)
def test_rows_need_resume_or_overwrite(images: Path, tmp_path: Path, format: Format) -> None:
    rows = tmp_path / "rows"
    write(format, rows)
    words = "" if format == "table" else "--resume goes on after them, "
    with pytest.raises(UserError, match=f"rows has rows of an earlier run: {words}--overwrite replaces them"):
        check([images], output=rows, format=format)
    check([images], output=rows, format=format, overwrite=True)
    if format != "table":
        check([images], output=rows, format=format, resume=True)
    other: Format = "csv" if format == "jsonl" else "jsonl"
    with pytest.raises(
        UserError, match=f"rows of an earlier run as {format}, and now they are to be {other}"
    ):
        check([images], output=rows, format=other, resume=True)
    check([images], output=tmp_path / "new", format=format)
    check([images], output=Path(os.devnull), format="csv")


def test_rows_of_an_unfinished_parquet_file_are_kept_too(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "rows.parquet"
    write("jsonl", journal_of(output))
    with pytest.raises(UserError, match=r"rows.parquet.rows.jsonl has rows of an earlier run"):
        check([images], output=output)
    check([images], output=output, resume=True)
    journal_of(output).write_bytes(JPEG)
    for how in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"rows.jsonl exists and is not rows of predictions"):
            check([images], output=output, **how)


def test_a_gallery_replaces_only_a_gallery(images: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.html").write_text("<!doctype html>\n<title>Mine</title>")
    for page, words in {
        images / "0.jpg": "is an input",
        tmp_path / "thesis.html": "is not a gallery",
    }.items():
        for overwrite in (False, True):
            with pytest.raises(UserError, match=f"--html .*{words}"):
                check([images], html=page, overwrite=overwrite)
    (tmp_path / "gallery.html").write_text(f"<!doctype html>{GENERATOR}")
    with pytest.raises(UserError, match="is a gallery of an earlier run: --overwrite replaces it"):
        check([images], html=tmp_path / "gallery.html")
    check([images], html=tmp_path / "gallery.html", overwrite=True)
    (tmp_path / "here").symlink_to(tmp_path)
    with pytest.raises(UserError, match="--html and --output name the same file"):
        check([images], html=tmp_path / "new", output=tmp_path / "here" / "new")


def test_overwrite_needs_a_file_and_excludes_resume(tmp_path: Path) -> None:
    for options, words in (
        ({"overwrite": True}, "--overwrite replaces a file: name it with --output or --html"),
        ({"overwrite": True, "resume": True, "output": tmp_path / "r.csv"}, "--overwrite with --resume"),
    ):
        with pytest.raises(UserError, match=words):
            check_options(PredictOptions(paths=["x"], **options))


def test_ctrl_c_says_how_to_go_on() -> None:
    rows = PredictOptions(paths=["x"], output=Path("rows.csv"))
    assert how_to_go_on(rows, "csv") == "the same command with --resume goes on after the rows in rows.csv"
    both = PredictOptions(paths=["x"], output=Path("r"), html=Path("h"), overwrite=True)
    assert how_to_go_on(both, "jsonl") == (
        "the same command with --resume in place of --overwrite, without --html goes on after the rows in r"
    )
    for nothing, format in ((PredictOptions(paths=["x"]), "jsonl"), (rows, "table")):
        assert "need --output and --format jsonl, csv or parquet" in how_to_go_on(nothing, format)  # type: ignore[arg-type]
