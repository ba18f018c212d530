"""Writers of rows as files: JSON lines, CSV and Parquet."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import msgspec

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable
from infer.predict.rows import ErrorRow, OkRow, Row

FileFormat = Literal["jsonl", "csv", "parquet"]
Format = Literal["table", "jsonl", "csv", "parquet"]
SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
ROW_GROUP = 4096
"""Rows that are turned into Parquet at a time."""

TRUTH_COLUMNS = ("truth_class_id", "truth_label", "truth_rank")

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


class RowWriter(Protocol):
    """Takes rows in order."""

    def write(self, row: Row) -> None:
        """Write one row; when it returns, a reader of the file sees it (Parquet: when all are written)."""


class JsonlWriter:
    """Writes one JSON object a line, in UTF-8, and flushes each, so that a reader sees it at once."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._encoder = msgspec.json.Encoder()

    def write(self, row: Row) -> None:
        self._stream.write(self._encoder.encode(row) + b"\n")
        self._stream.flush()


class CsvWriter:
    """Writes path, status, error, and class_id, label and probability of each place, in UTF-8.

    Args:
        stream: where to write.
        places: classes in a row.
        header: whether to begin with the names of the columns.
        truth: whether the true class follows, and its rank.
    """

    def __init__(self, stream: BinaryIO, places: int, *, header: bool = True, truth: bool = False) -> None:
        self._stream, self._places, self._truth = stream, places, truth
        if header:
            self._put(csv_columns(places, truth))

    def write(self, row: Row) -> None:
        error = row.error if isinstance(row, ErrorRow) else ""
        cells: list[object] = [safe_cell(row.path), row.status, safe_cell(error)]
        predictions = row.predictions if isinstance(row, OkRow) else ()
        for one in predictions:
            cells += [one.class_id, safe_cell(one.label), one.probability]
        cells += [""] * (3 * (self._places - len(predictions)))
        if self._truth:
            truth = row.truth if isinstance(row, OkRow) else msgspec.UNSET
            cells += [truth.class_id, safe_cell(truth.label), truth.rank] if truth else [""] * 3
        self._put(cells)

    def _put(self, cells: Iterable[object]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        self._stream.write(text.getvalue().encode())
        self._stream.flush()


def csv_columns(places: int, truth: bool = False) -> list[str]:
    """Names of the columns for rows of `places` classes, with or without the true one."""
    names = ("class_id", "label", "probability")
    columns = ["path", "status", "error", *(f"{name}_{n}" for n in range(1, places + 1) for name in names)]
    return [*columns, *TRUTH_COLUMNS] if truth else columns


def safe_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula.

    Source: OWASP, "CSV Injection".

    >>> safe_cell("=HYPERLINK()"), safe_cell("cat.jpg")
    ("'=HYPERLINK()", 'cat.jpg')
    """
    return "'" + text if text.startswith(_FORMULA) else text


@contextmanager
def open_output(
    format: FileFormat,
    output: Path | None,
    places: int,
    *,
    append: bool,
    stdout: BinaryIO,
    truth: bool = False,
) -> Iterator[RowWriter]:
    """A writer of rows.

    A Parquet file cannot be read before its end is written. Its rows go to `<output>.rows.jsonl` first, which
    becomes the Parquet file when all are there; if the run ends before, a later one resumes from it.

    Args:
        format: of the rows.
        output: the file; None for `stdout`, which takes no Parquet.
        places: classes in a row.
        append: whether to continue after the rows that are there.
        stdout: the standard output of the process.
        truth: whether rows have the true class.
    Raises:
        UserError: the file cannot be written, or Parquet without pyarrow.
    """
    if output is None:
        assert format != "parquet"
        yield JsonlWriter(stdout) if format == "jsonl" else CsvWriter(stdout, places, truth=truth)
        return
    if format == "parquet":
        import_parquet()
    target = journal_of(output) if format == "parquet" else output
    with name_unwritable(target):
        file = target.open("ab" if append else "wb")
    with file:
        if format == "csv":
            yield CsvWriter(file, places, header=file.tell() == 0, truth=truth)
        else:
            yield JsonlWriter(file)
    if format == "parquet":
        _write_parquet(target, output, truth)
        target.unlink()


@contextmanager
def name_unwritable(path: Path) -> Iterator[None]:
    """Turns a failure to open a file for writing into a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {printable(path)}: {error.strerror or error}") from error


def journal_of(output: Path) -> Path:
    """The file that holds the rows of a Parquet file until all are there."""
    return output.with_name(output.name + ".rows.jsonl")


def import_parquet() -> tuple[Any, Any]:
    """pyarrow and its Parquet module.

    Raises:
        UserError: not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise UserError("Parquet needs pyarrow: pip install 'alexnet[parquet]'") from error
    return pyarrow, pyarrow.parquet


def parquet_schema(truth: bool = False) -> Any:
    """Columns path, status, error, predictions (a list of class_id, label, probability), and the truth."""
    pa, _ = import_parquet()
    prediction = pa.struct([("class_id", pa.int64()), ("label", pa.string()), ("probability", pa.float64())])
    columns = [("path", pa.string()), ("status", pa.string()), ("error", pa.string())]
    columns.append(("predictions", pa.list_(prediction)))
    if truth:
        columns.append(
            ("truth", pa.struct([("class_id", pa.int64()), ("label", pa.string()), ("rank", pa.int64())]))
        )
    return pa.schema(columns)


def _write_parquet(journal: Path, output: Path, truth: bool) -> None:
    pa, pq = import_parquet()
    schema = parquet_schema(truth)
    temporary = output.with_name(f".{output.name}.partial")
    with journal.open("rb") as lines, pq.ParquetWriter(temporary, schema) as writer:
        while rows := [msgspec.json.decode(line) for line in itertools.islice(lines, ROW_GROUP)]:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    temporary.replace(output)
