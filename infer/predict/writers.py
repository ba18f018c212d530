"""Writers of rows as files: JSON lines, CSV and Parquet."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import msgspec

from data_pipeline.common.errors import CorruptFileError, UserError, raising
from data_pipeline.common.text import printable
from infer.predict.rows import ErrorRow, OkRow, Row, RowShape

FileFormat = Literal["jsonl", "csv", "parquet"]
Format = Literal["table", "jsonl", "csv", "parquet", "features"]
SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
ROW_GROUP = 4096
"""Rows that are turned into Parquet at a time."""

FOOTER_BYTES = 1 << 16
"""So much of the end of a Parquet file is looked at."""
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
    """Writes path, status, error, and class_id, class, label and probability of each place, in UTF-8.

    Args:
        stream: where to write.
        shape: of the rows.
        header: whether to begin with the names of the columns.
    """

    def __init__(self, stream: BinaryIO, shape: RowShape, *, header: bool = True) -> None:
        self._stream, self._shape, self._columns = stream, shape, csv_columns(shape)
        if header:
            self._put(self._columns)

    def write(self, row: Row) -> None:
        error = row.error if isinstance(row, ErrorRow) else ""
        cells: list[object] = [safe_cell(row.path), row.status, safe_cell(error)]
        predictions = row.predictions if isinstance(row, OkRow) else ()
        for one in predictions:
            also = [safe_cell(one.class_name or "")] if self._shape.named else []
            cells += [one.class_id, *also, safe_cell(one.label), one.probability]
        truth = row.truth if isinstance(row, OkRow) else msgspec.UNSET
        last = [truth.class_id, safe_cell(truth.label), truth.rank] if truth else []  # the last columns
        self._put([*cells, *[""] * (len(self._columns) - len(cells) - len(last)), *last])

    def _put(self, cells: Iterable[object]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        self._stream.write(text.getvalue().encode())
        self._stream.flush()


def csv_columns(shape: RowShape) -> list[str]:
    """Names of the columns for rows of a shape."""
    names = ("class_id", *(("class",) if shape.named else ()), "label", "probability")
    places = [f"{name}_{n}" for n in range(1, shape.places + 1) for name in names]
    return ["path", "status", "error", *places, *(TRUTH_COLUMNS if shape.truth else ())]


def safe_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula.

    Source: OWASP, "CSV Injection".

    >>> safe_cell("=HYPERLINK()"), safe_cell("cat.jpg")
    ("'=HYPERLINK()", 'cat.jpg')
    """
    return "'" + text if text.startswith(_FORMULA) else text


@contextmanager
def open_output(
    format: FileFormat, output: Path | None, shape: RowShape, *, append: bool, stdout: BinaryIO
) -> Iterator[RowWriter]:
    """A writer of rows.

    A Parquet file cannot be read before its end is written. Its rows go to `<output>.rows.jsonl` first, which
    becomes the Parquet file when all are there; if the run ends before, a later one resumes from it.

    Args:
        format: of the rows.
        output: the file; None for `stdout`, which takes no Parquet.
        shape: of the rows.
        append: whether to continue after the rows that are there.
        stdout: the standard output of the process.
    Raises:
        UserError: the file cannot be written, or Parquet without pyarrow.
    """
    if output is None:
        assert format != "parquet"
        yield JsonlWriter(stdout) if format == "jsonl" else CsvWriter(stdout, shape)
        return
    if format == "parquet":
        import_parquet()
    target = journal_of(output) if format == "parquet" else output
    with name_unwritable(target):
        file = target.open("ab" if append else "wb")
    with file:
        yield CsvWriter(file, shape, header=file.tell() == 0) if format == "csv" else JsonlWriter(file)
    if format == "parquet":
        _write_parquet(target, output, shape)
        target.unlink()


def name_unwritable(path: Path) -> AbstractContextManager[None]:
    """Turns a failure to open a file for writing into a `UserError` that names the file."""
    return raising(UserError, f"cannot write {printable(path)}")


def journal_of(output: Path) -> Path:
    """The file with the rows of a Parquet file until all are there, or with the paths of a `.npy` file's."""
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


def parquet_footer(path: Path) -> bytes:
    """The end of a Parquet file, which names its columns and holds its metadata."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - FOOTER_BYTES))
        return file.read()


def parquet_schema(shape: RowShape) -> Any:
    """Columns path, status, error, predictions (lists of class_id, class, label, probability) and truth."""
    pa, _ = import_parquet()
    named = [("class", pa.string())] if shape.named else []
    prediction = pa.struct(
        [("class_id", pa.int64()), *named, ("label", pa.string()), ("probability", pa.float64())]
    )
    columns = [("path", pa.string()), ("status", pa.string()), ("error", pa.string())]
    columns.append(("predictions", pa.list_(prediction)))
    if shape.truth:
        columns.append(
            ("truth", pa.struct([("class_id", pa.int64()), ("label", pa.string()), ("rank", pa.int64())]))
        )
    return pa.schema(columns)


def _write_parquet(journal: Path, output: Path, shape: RowShape) -> None:
    pa, pq = import_parquet()
    schema = parquet_schema(shape)
    temporary = output.with_name(f".{output.name}.partial")
    with journal.open("rb") as lines, pq.ParquetWriter(temporary, schema) as writer:
        while rows := [msgspec.json.decode(line) for line in itertools.islice(lines, ROW_GROUP)]:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    temporary.replace(output)


def restore_journal(output: Path, shape: RowShape) -> None:
    """Turn a finished Parquet file back into its journal, to continue after its last row.

    Raises:
        UserError: it has other columns.
        CorruptFileError: it is no whole Parquet file.
    """
    pa, pq = import_parquet()
    journal = journal_of(output)
    temporary = journal.with_name(f".{journal.name}.partial")
    try:
        with pq.ParquetFile(output) as file, temporary.open("wb") as lines:
            if not file.schema_arrow.equals(parquet_schema(shape)):
                raise UserError(f"--resume: {printable(output)} has other columns than rows of predictions")
            for batch in file.iter_batches(ROW_GROUP):
                for row in batch.to_pylist():
                    lines.write(msgspec.json.encode({k: v for k, v in row.items() if v is not None}) + b"\n")
    except (pa.ArrowException, OSError) as error:
        raise CorruptFileError(f"{printable(output)} is no whole Parquet file: {error}") from error
    temporary.replace(journal)
