"""The rows of one part as a file: those of a single process, with `index`, their place among all."""

from __future__ import annotations

import io
import logging
import uuid
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from data_pipeline.common.errors import SaveError
from data_pipeline.common.files import fsync_path
from data_pipeline.common.text import printable
from infer.predict.rows import Row
from infer.predict.writers import import_parquet, parquet_schema
from infer.ray.job_folder import Job, Plan

log = logging.getLogger("infer")

_WRITING = ".writing"


class _Row(msgspec.Struct):
    index: int
    path: str
    status: Literal["ok", "error"]


def write_part(plan: Plan, number: int, rows: Sequence[Row]) -> None:
    """Write the rows of a part so that they are there whole or not at all, however many do so at once.

    Raises:
        SaveError: they cannot be written.
    """
    path = plan.part_path(number)
    # A name of its own, since a worker that is taken for dead may still be writing the same part.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_WRITING}")
    try:
        temporary.write_bytes(_encode(plan.job, number, rows))
        fsync_path(temporary)
        temporary.replace(path)
    except OSError as error:
        raise SaveError(f"cannot write {printable(path)}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _encode(job: Job, number: int, rows: Sequence[Row]) -> bytes:
    first = number * job.part_rows
    indexed: list[dict[str, Any]] = [
        {"index": index, **msgspec.to_builtins(row)} for index, row in enumerate(rows, first)
    ]
    if job.format == "jsonl":
        return msgspec.json.Encoder().encode_lines(indexed)
    pa, pq = import_parquet()
    schema, buffer = pa.schema([("index", pa.int64()), *parquet_schema()]), io.BytesIO()
    pq.write_table(pa.Table.from_pylist(indexed, schema), buffer)
    return buffer.getvalue()


def completed_parts(plan: Plan) -> dict[int, int]:
    """Number of error rows in each part that is there and whole; logs which are not whole.

    What was being written when an earlier run ended is removed.
    """
    for leftover in plan.folder.glob(f".part-*{_WRITING}"):
        leftover.unlink(missing_ok=True)
    completed = {}
    for number in range(plan.num_parts):
        path = plan.part_path(number)
        try:
            if path.exists():
                completed[number] = _count_errors(plan, number)
        except (ValueError, OSError, msgspec.DecodeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            log.warning(f"{printable(path)} is not whole and is predicted again: {reason}")
    return completed


def _count_errors(plan: Plan, number: int) -> int:
    """Number of error rows in a part; ValueError if its rows are not of its inputs, by index and path."""
    path = plan.part_path(number)
    if plan.job.format == "jsonl":
        lines = path.read_bytes()
        if not lines.endswith(b"\n"):
            raise ValueError("its last row is cut short")
        rows = msgspec.json.Decoder(_Row).decode_lines(lines)
    else:
        _, pq = import_parquet()
        columns = pq.read_table(path, columns=["index", "path", "status"])  # its errors are ValueErrors
        rows = msgspec.convert(columns.to_pylist(), list[_Row])
    names = [printable(one.path) for one in plan.inputs(number)]
    if [(row.index, row.path) for row in rows] != list(enumerate(names, number * plan.job.part_rows)):
        raise ValueError("its rows are not those of its inputs")
    return sum(row.status == "error" for row in rows)
