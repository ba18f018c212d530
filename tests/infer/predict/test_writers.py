"""Rows as files: what is written can be read back, and a run that was cut off goes on after its last row."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Literal, cast

import pyarrow.parquet
import pytest

from data_pipeline.common.errors import CorruptFileError, UserError
from infer.predict.resume import completed_rows, skip_completed
from infer.predict.rows import ErrorRow, OkRow, Prediction, Row, RowShape
from infer.predict.writers import CsvWriter, FileFormat, JsonlWriter, open_output

FORMATS: tuple[FileFormat, ...] = ("jsonl", "csv", "parquet")
ROWS: list[Row] = [
    OkRow(
        path='-a "b",\n=c.jpg',
        predictions=(
            Prediction(class_id=1, label="=cmd|' /C calc'!A0", probability=0.75),
            Prediction(class_id=0, label="猫", probability=0.2),
        ),
    ),
    ErrorRow(path="+gone.jpg", error="@odd\treason"),
    OkRow(path="none.jpg", predictions=()),
]
PATHS = [Path(row.path) for row in ROWS]


SHAPE = RowShape(2, named=False)


def write(format: FileFormat, path: Path, rows: list[Row], append: bool, shape: RowShape = SHAPE) -> None:
    with open_output(format, path, shape, append=append, stdout=io.BytesIO()) as writer:
        for row in rows:
            writer.write(row)


def read(format: FileFormat, path: Path) -> list[dict[str, object]]:
    if format == "jsonl":
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    if format == "csv":
        with path.open(newline="", encoding="utf-8") as file:
            return [dict(row) for row in csv.DictReader(file)]
    rows: list[dict[str, object]] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def test_csv_cells_are_no_formulas(tmp_path: Path) -> None:
    write("csv", tmp_path / "rows.csv", ROWS, append=False)
    first, error, none = read("csv", tmp_path / "rows.csv")
    assert first["path"] == '\'-a "b",\n=c.jpg' and first["label_1"] == "'=cmd|' /C calc'!A0"
    assert (first["class_id_1"], first["probability_1"], first["label_2"]) == ("1", "0.75", "猫")
    assert (error["path"], error["status"], error["error"]) == ("'+gone.jpg", "error", "'@odd\treason")
    assert none["status"] == "ok" and none["class_id_1"] == none["label_2"] == ""


def test_parquet_holds_types_and_lists(tmp_path: Path) -> None:
    write("parquet", tmp_path / "rows.parquet", ROWS, append=False)
    first, error, none = read("parquet", tmp_path / "rows.parquet")
    assert first["predictions"][0] == {  # type: ignore[index]
        "class_id": 1, "label": "=cmd|' /C calc'!A0", "probability": 0.75
    }  # fmt: skip
    assert first["error"] is None and error["error"] == "@odd\treason" and error["predictions"] is None
    assert none["predictions"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"], "the rows' journal is gone"


@pytest.mark.parametrize("format", FORMATS)
def test_resumed_output_equals_that_of_one_run(tmp_path: Path, format: FileFormat) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    write(format, whole, ROWS, append=False)
    write(format, parts, ROWS[:2], append=False)
    items = iter(PATHS)
    assert skip_completed(format, parts, SHAPE, items) == (2, 1)
    write(format, parts, ROWS[2:], append=True)
    assert next(items) == PATHS[2]
    assert read(format, parts) == read(format, whole)
    if format != "parquet":
        assert parts.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_row_cut_at_any_byte_is_written_again(
    tmp_path: Path, format: Literal["jsonl", "csv"], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows"
    write(format, path, ROWS, append=False)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = list(completed_rows(format, path, SHAPE))
        write(format, path, ROWS[len(kept) :], append=True)
        assert path.read_bytes() == whole, size
    assert "rows ended within a row, which is done again" in caplog.messages[-1]


def test_parquet_resumes_from_its_journal(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    with (
        pytest.raises(KeyboardInterrupt),
        open_output("parquet", path, SHAPE, append=False, stdout=io.BytesIO()) as writer,
    ):
        writer.write(ROWS[0])
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["rows.parquet.rows.jsonl"]
    items = iter(PATHS)
    assert skip_completed("parquet", path, SHAPE, items) == (1, 0)
    write("parquet", path, ROWS[1:], append=True)
    assert [row["path"] for row in read("parquet", path)] == [row.path for row in ROWS]


def test_parquet_journal_cut_within_a_row_resumes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, journal = tmp_path / "rows.parquet", tmp_path / "rows.parquet.rows.jsonl"
    write("jsonl", journal, ROWS, append=False)
    whole = journal.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1, len(whole)):
        journal.write_bytes(whole[:size])
        kept = list(completed_rows("parquet", path, SHAPE))
        assert len(kept) == whole[:size].count(b"\n")
        write("parquet", path, ROWS[len(kept) :], append=True)
        assert [row["path"] for row in read("parquet", path)] == [row.path for row in ROWS]
        assert not journal.exists()
        path.unlink()
    assert "rows.parquet.rows.jsonl ended within a row, which is done again" in caplog.text


def test_rows_of_other_inputs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write("jsonl", path, ROWS, append=False)
    with pytest.raises(
        UserError, match=r"row 2 of .*rows.jsonl is of \+gone.jpg, and that input is other.jpg"
    ):
        skip_completed("jsonl", path, SHAPE, iter([PATHS[0], Path("other.jpg")]))
    with pytest.raises(UserError, match="has more rows than there are inputs"):
        skip_completed("jsonl", path, SHAPE, iter(PATHS[:2]))
    path.write_bytes(b'{"path":1}\n')
    with pytest.raises(CorruptFileError, match=r"row 1 of .*rows.jsonl is damaged"):
        list(completed_rows("jsonl", path, SHAPE))
    write("csv", path, ROWS, append=False)
    with pytest.raises(UserError, match="has other columns; give --top and --truth as before"):
        list(completed_rows("csv", path, RowShape(3, named=False)))
    with pytest.raises(CorruptFileError, match="no whole Parquet file"):
        list(completed_rows("parquet", path, SHAPE))
    with pytest.raises(UserError, match=r"cannot write .*: Is a directory"):
        write("jsonl", tmp_path, ROWS, append=False)


NAMED: list[Row] = [
    OkRow(
        path="a.jpg",
        predictions=(
            Prediction(class_id=1, class_name="n03992509", label="potter's wheel", probability=0.75),
            Prediction(class_id=0, class_name="=n1", label="maillot, tank suit", probability=0.25),
        ),
    ),
    ROWS[1],
    OkRow(path="b.jpg", predictions=()),
]


@pytest.mark.parametrize("format", FORMATS)
def test_named_classes_stand_beside_their_labels(tmp_path: Path, format: FileFormat) -> None:
    whole, parts, shape = tmp_path / "whole", tmp_path / "parts", RowShape(2, named=True)
    write(format, whole, NAMED, append=False, shape=shape)
    first, error, none = read(format, whole)
    if format == "csv":
        found = [first[f"{name}_{n}"] for n in (1, 2) for name in ("class_id", "class", "label")]
        assert found == ["1", "n03992509", "potter's wheel", "0", "'=n1", "maillot, tank suit"]
        assert first["probability_2"] == "0.25" and none["class_1"] == none["probability_2"] == ""
    else:
        best, second = cast("list[dict[str, object]]", first["predictions"])
        want = {"class_id": 1, "class": "n03992509", "label": "potter's wheel", "probability": 0.75}
        assert best == want and list(best) == list(want)
        assert (second["class"], none["predictions"], error["error"]) == ("=n1", [], "@odd\treason")
    write(format, parts, NAMED[:2], append=False, shape=shape)
    items = iter(Path(row.path) for row in NAMED)
    assert skip_completed(format, parts, shape, items) == (2, 1)
    write(format, parts, NAMED[2:], append=True, shape=shape)
    assert read(format, parts) == read(format, whole)


def test_rows_are_flushed_as_they_are_written() -> None:
    for make in (JsonlWriter, lambda stream: CsvWriter(stream, SHAPE)):
        stream = io.BytesIO()
        writer = make(stream)
        sizes = []
        for row in ROWS:
            writer.write(row)
            sizes.append(len(stream.getvalue()))
        assert sizes == sorted(set(sizes))
