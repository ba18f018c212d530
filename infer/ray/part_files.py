"""The rows of one part as a file: as those of a single process, with their place among all as `index`."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from data_pipeline.common.errors import SaveError
from data_pipeline.common.files import fsync_path
from data_pipeline.common.text import printable
from infer.predict.rows import Row
from infer.predict.writers import import_parquet, parquet_schema
from infer.ray.job_folder import JobFolder, PartFormat

_WRITING = ".writing"


class KeptPart(NamedTuple):
    """A part that is there already."""

    number: int
    rows: int
    errors: int


class _Kept(msgspec.Struct):
    index: int
    path: str
    status: Literal["ok", "error"]


def write_part(path: Path, format: PartFormat, first: int, rows: Sequence[Row]) -> None:
    """Write a part so that it is there whole or not at all, however many do so at once.

    Args:
        path: the file.
        format: how.
        first: the place of the first row among all.
        rows: in order.
    Raises:
        SaveError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_WRITING}")
    try:
        try:
            if format == "jsonl":
                with temporary.open("wb") as file:
                    for index, row in enumerate(rows, first):
                        file.write(msgspec.json.encode(_indexed(index, row)) + b"\n")
            else:
                pa, pq = import_parquet()
                table = pa.Table.from_pylist(
                    [_indexed(i, row) for i, row in enumerate(rows, first)], _schema()
                )
                pq.write_table(table, temporary)
            fsync_path(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise SaveError(f"cannot write {printable(path)}: {error.strerror or error}") from error


def kept_parts(job: JobFolder) -> Iterator[KeptPart | str]:
    """The parts that are there and whole, each row held against its input; a sentence for each other."""
    for number in range(len(job.job.parts)):
        path = job.part_path(number)
        if not path.exists():
            continue
        try:
            errors = _errors_in(job, number, path)
        except (ValueError, OSError, msgspec.DecodeError) as error:
            what = (str(error).splitlines() or [""])[0]
            yield f"{printable(path)} is not whole and is predicted again: {what}"
            continue
        yield KeptPart(number, job.job.parts[number].count, errors)


def remove_leftovers(folder: Path) -> None:
    """Remove what was being written when an earlier run ended."""
    for path in folder.glob(f".part-*{_WRITING}"):
        path.unlink(missing_ok=True)


def _errors_in(job: JobFolder, number: int, path: Path) -> int:
    """How many rows of a part are errors; ValueError if they are not those of its inputs."""
    part, errors = job.job.parts[number], 0
    inputs = job.inputs_of(number).inputs
    for place, (row, one) in enumerate(itertools.zip_longest(_read(path, job.job.format), inputs)):
        if row is None or one is None:
            raise ValueError(f"it has not {part.count} rows")
        name = printable(os.fsdecode(one.path))
        if (row.index, row.path) != (part.first + place, name):
            raise ValueError(f"row {place + 1} is {row.index}, {row.path}, not {part.first + place}, {name}")
        errors += row.status == "error"
    return errors


def _read(path: Path, format: PartFormat) -> Iterator[_Kept]:
    if format == "jsonl":
        with path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    raise ValueError("its last row is cut short")
                yield msgspec.json.decode(line, type=_Kept)
        return
    _, pq = import_parquet()
    columns = pq.read_table(path, columns=["index", "path", "status"])  # its errors are ValueErrors
    yield from msgspec.convert(columns.to_pylist(), list[_Kept])


def _indexed(index: int, row: Row) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(row)
    return {"index": index, **fields}


def _schema() -> Any:
    pa, _ = import_parquet()
    return pa.schema([("index", pa.int64()), *parquet_schema()])
