"""Rows of predictions as files: JSON lines, CSV and Parquet, written as they come, and gone on with later."""

from __future__ import annotations

import csv
import io
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import msgspec

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.text import printable
from infer.predict.rows import ErrorRow, Item, OkRow, Row, path_of

log = logging.getLogger("infer")

Format = Literal["table", "jsonl", "csv", "parquet"]
SUFFIXES: dict[str, Format] = {".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}
ROW_GROUP = 4096
"""Rows that are turned into Parquet at a time."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


class KeptRow(NamedTuple):
    """What a row of an earlier run was about, as it is written there."""

    path: str
    failed: bool


class RowWriter(Protocol):
    """Takes rows in order."""

    def write(self, row: Row) -> None:
        """Write one row; when it returns, a reader of the file sees it (Parquet: when all are written)."""


class JsonlWriter:
    """One JSON object a line, in UTF-8, flushed row by row so that a reader sees them as they come."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._encoder = msgspec.json.Encoder()

    def write(self, row: Row) -> None:
        self._stream.write(self._encoder.encode(row) + b"\n")
        self._stream.flush()


class CsvWriter:
    """Path, status, error, and class_id, label and probability of each place, in UTF-8.

    Args:
        stream: where to.
        places: classes a row.
        header: whether to begin with the columns' names.
    """

    def __init__(self, stream: BinaryIO, places: int, *, header: bool = True) -> None:
        self._stream, self._places = stream, places
        if header:
            self._put(csv_columns(places))

    def write(self, row: Row) -> None:
        error = row.error if isinstance(row, ErrorRow) else ""
        cells: list[object] = [safe_cell(row.path), row.status, safe_cell(error)]
        found = row.predictions if isinstance(row, OkRow) else ()
        for one in found:
            cells += [one.class_id, safe_cell(one.label), one.probability]
        self._put([*cells, *[""] * (3 * (self._places - len(found)))])

    def _put(self, cells: Iterable[object]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        self._stream.write(text.getvalue().encode())
        self._stream.flush()


def csv_columns(places: int) -> list[str]:
    """Names of the columns for so many classes a row."""
    names = ("class_id", "label", "probability")
    return ["path", "status", "error", *(f"{name}_{n}" for n in range(1, places + 1) for name in names)]


def safe_cell(text: str) -> str:
    """A text that no spreadsheet takes for a formula.

    Source: OWASP, "CSV Injection".

    >>> safe_cell("=HYPERLINK()"), safe_cell("cat.jpg")
    ("'=HYPERLINK()", 'cat.jpg')
    """
    return "'" + text if text.startswith(_FORMULA) else text


@contextmanager
def open_output(
    format: Literal["jsonl", "csv", "parquet"],
    output: Path | None,
    places: int,
    *,
    append: bool,
    stdout: BinaryIO,
) -> Iterator[RowWriter]:
    """A writer of rows.

    Parquet cannot be read before its end is written. Its rows go to `<output>.rows.jsonl` first, which
    becomes the Parquet file when all are there, and which a later run goes on with if that is not to be.

    Args:
        format: how.
        output: the file; None for `stdout`.
        places: classes a row.
        append: go on after the rows that are there.
        stdout: the process's own.
    Raises:
        UserError: the file cannot be written; Parquet to stdout, or without pyarrow.
    """
    if output is None:
        if format == "parquet":
            raise UserError("--format parquet needs a file: --output rows.parquet")
        yield JsonlWriter(stdout) if format == "jsonl" else CsvWriter(stdout, places)
        return
    target = _journal(output) if format == "parquet" else output
    if format == "parquet":
        import_parquet()
    try:
        file = target.open("ab" if append else "wb")
    except OSError as error:
        raise UserError(f"cannot write {printable(target)}: {error.strerror or error}") from error
    with file:
        empty = file.tell() == 0
        yield CsvWriter(file, places, header=empty) if format == "csv" else JsonlWriter(file)
    if format == "parquet":
        _write_parquet(target, output)
        target.unlink()


def has_rows(format: Format, output: Path) -> bool:
    """Whether an earlier run began to write this file."""
    files = (output, _journal(output)) if format == "parquet" else (output,)
    return any(file.is_file() and file.stat().st_size for file in files)


def skip_kept(
    kept: Iterable[KeptRow], items: Iterator[Item], format: Format, output: Path
) -> tuple[int, int]:
    """Pass the inputs that have their row already.

    Args:
        kept: rows of the earlier run.
        items: the inputs of this one; those with a row are taken from it.
        format: of the file.
        output: the file, for messages.
    Returns:
        How many rows there are, and how many of them are errors.
    Raises:
        UserError: the rows are not those of the first inputs.
    """
    rows = errors = 0
    for row in kept:
        item = next(items, None)
        if item is None:
            raise UserError(f"--resume: {printable(output)} has more rows than there are inputs")
        path = printable(path_of(item))
        if row.path != (safe_cell(path) if format == "csv" else path):
            raise UserError(
                f"--resume: row {rows + 1} of {printable(output)} is of {row.path}, and that input "
                f"is {path}: "
                "give the inputs that it was begun with, or another --output"
            )
        rows, errors = rows + 1, errors + row.failed
    return rows, errors


def kept_rows(format: Format, output: Path, places: int) -> Iterator[KeptRow]:
    """The rows that an output file has already; a last line that was only half written is cut off, and said.

    Raises:
        CorruptFileError: a file that holds something else.
        UserError: a table, or a CSV file with other columns.
    """
    if format == "table":
        raise UserError("--resume needs --format jsonl, csv or parquet: a table cannot be read back")
    if format == "parquet":
        journal = _journal(output)
        if not journal.exists() and output.exists():
            _read_parquet(output, journal)
        format, output = "jsonl", journal
    if not output.exists():
        return
    whole = 0
    with output.open("rb") as file:
        for number, record in enumerate(_records(file, quoted=format == "csv")):
            if not record.endswith(b"\n"):
                break
            row = _parse(record, format, number, output, places)
            whole += len(record)
            if row is not None:
                yield row
    if whole < output.stat().st_size:
        log.warning("%s ended within a row, which is done again", printable(output))
        os.truncate(output, whole)


def _records(file: BinaryIO, quoted: bool) -> Iterator[bytes]:
    """Lines; in CSV, a record goes on while a quote is open."""
    record = b""
    for line in file:
        record += line
        if not quoted or record.count(b'"') % 2 == 0:
            yield record
            record = b""
    if record:
        yield record.removesuffix(b"\n")  # within quotes, so not whole


class _JsonRow(msgspec.Struct):
    path: str
    status: Literal["ok", "error"]


def _parse(record: bytes, format: Format, number: int, output: Path, places: int) -> KeptRow | None:
    try:
        if format == "jsonl":
            row = msgspec.json.decode(record, type=_JsonRow)
            return KeptRow(row.path, row.status == "error")
        (cells,) = csv.reader(io.StringIO(record.decode(), newline=""), strict=True)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise CorruptFileError(f"row {number + 1} of {printable(output)} is damaged: {error}") from error
    if number == 0:
        if cells != csv_columns(places):
            raise UserError(
                f"--resume: {printable(output)} has other columns; give --top as it was begun with"
            )
        return None
    if len(cells) != len(csv_columns(places)) or cells[1] not in ("ok", "error"):
        raise CorruptFileError(f"row {number + 1} of {printable(output)} is damaged: {len(cells)} cells")
    return KeptRow(cells[0], cells[1] == "error")


def _journal(output: Path) -> Path:
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


def parquet_schema() -> Any:
    """Columns path, status, error and predictions, a list of class_id, label and probability."""
    pa, _ = import_parquet()
    prediction = pa.struct([("class_id", pa.int64()), ("label", pa.string()), ("probability", pa.float64())])
    columns = [("path", pa.string()), ("status", pa.string()), ("error", pa.string())]
    return pa.schema([*columns, ("predictions", pa.list_(prediction))])


def _write_parquet(journal: Path, output: Path) -> None:
    pa, pq = import_parquet()
    schema = parquet_schema()
    temporary = output.with_name(f".{output.name}.partial")
    with journal.open("rb") as lines, pq.ParquetWriter(temporary, schema) as writer:
        while rows := [msgspec.json.decode(line) for line in itertools.islice(lines, ROW_GROUP)]:
            writer.write_table(pa.Table.from_pylist(rows, schema))
    temporary.replace(output)


def _read_parquet(output: Path, journal: Path) -> None:
    pa, pq = import_parquet()
    temporary = journal.with_name(f".{journal.name}.partial")
    try:
        with pq.ParquetFile(output) as file, temporary.open("wb") as lines:
            if not file.schema_arrow.equals(parquet_schema()):
                raise UserError(f"--resume: {printable(output)} has other columns than rows of predictions")
            for batch in file.iter_batches(ROW_GROUP):
                for row in batch.to_pylist():
                    lines.write(msgspec.json.encode({k: v for k, v in row.items() if v is not None}) + b"\n")
    except (pa.ArrowException, OSError) as error:
        raise CorruptFileError(f"{printable(output)} is no whole Parquet file: {error}") from error
    temporary.replace(journal)
