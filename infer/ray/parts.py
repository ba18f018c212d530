"""The parts of a job: predicts them, writes their rows to files, and finds those that are there already.

The rows are those of a single process, with `index`, their place among all. Nothing here knows Ray.
"""

from __future__ import annotations

import io
import logging
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from data_pipeline.common.errors import CorruptFileError, SaveError, UserError, raising
from data_pipeline.common.files import fsync_path, sha256_of
from data_pipeline.common.text import printable
from infer.predict.resume import manifest_file_sha256
from infer.predict.rows import CompletedRow, ErrorRow, Row, RowShape
from infer.predict.table import RowCounter, Summary
from infer.predict.writers import import_parquet, parquet_schema
from infer.predictor import Predictor
from infer.ray.job_folder import INPUTS_NAME, Job, Plan

log = logging.getLogger("infer")

_WRITING = ".writing"


class PartResult(NamedTuple):
    """A part that is done: on which machine, by what, and its counts."""

    host: str
    runs_on: str
    summary: Summary


class PartWorker:
    """Predicts parts and writes their files.

    Args:
        plan: of the job; its folder is at the same path on all machines.
        model: the folder of the bundle; at the same path on all machines.
        strict: whether an input that cannot be read ends the job.
        settings: keyword arguments of the `Predictor`.
    """

    def __init__(self, plan: Plan, model: Path, strict: bool, settings: dict[str, Any]) -> None:
        self._plan, self._model, self._strict, self._settings = plan, model, strict, settings
        self.predictor: Predictor | None = None

    def __call__(self, row: dict[str, int]) -> dict[str, PartResult | Exception]:
        """Predict the part whose number is the row's `item`.

        An error that a user can act on is a result: of one that is raised, Ray would make a traceback.
        """
        host = socket.gethostname()
        try:
            return {"item": self.predict(row["item"], host)}
        except (UserError, CorruptFileError, SaveError) as error:
            return {"item": type(error)(f"on worker {host}: {error}")}

    def predict(self, number: int, host: str = "") -> PartResult:
        """Predict a part and write its file."""
        loaded = self.predictor is not None
        predictor = self.predictor = self.predictor or self._load()
        counter = RowCounter(predictor.backend, 0.0 if loaded else predictor.load_s)
        items = [one.item() for one in self._plan.inputs(number)]
        rows = [one.row for one in counter.count(predictor.rows(items))]
        failed = next((row for row in rows if isinstance(row, ErrorRow)), None)
        if failed is not None and self._strict:
            raise CorruptFileError(f"{failed.path}: {failed.error} (--strict)")
        write_part(self._plan, number, rows, predictor.row_shape)
        return PartResult(host, predictor.runs_on, counter.summary())

    def _load(self) -> Predictor:
        """Load the model, if this machine sees the same inputs and the same model as the driver."""
        inputs = self._plan.folder / INPUTS_NAME
        if not inputs.exists() or sha256_of(inputs) != self._plan.job.inputs_sha256:
            raise UserError(
                f"{printable(inputs)} is not that of the job: --output must be a folder that all machines "
                "share, at one path"
            )
        predictor = Predictor(self._model, **self._settings)
        if manifest_file_sha256(predictor.bundle) != self._plan.job.identity.model_sha256:
            predictor.close()
            raise UserError(f"{printable(self._model)} is another model than on the machine that asks")
        return predictor


def write_part(plan: Plan, number: int, rows: Sequence[Row], shape: RowShape) -> None:
    """Write the rows of a part so that they are there whole or not at all, however many do so at once.

    Raises:
        SaveError: they cannot be written.
    """
    path = plan.part_path(number)
    # A name of its own, since a worker that is taken for dead may still be writing the same part.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{_WRITING}")
    try:
        with raising(SaveError, f"cannot write {printable(path)}"):
            temporary.write_bytes(_encode(plan.job, number, rows, shape))
            fsync_path(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _encode(job: Job, number: int, rows: Sequence[Row], shape: RowShape) -> bytes:
    first = number * job.part_rows
    indexed: list[dict[str, Any]] = [
        {"index": index, **msgspec.to_builtins(row)} for index, row in enumerate(rows, first)
    ]
    if job.format == "jsonl":
        return msgspec.json.Encoder().encode_lines(indexed)
    pa, pq = import_parquet()
    schema, buffer = pa.schema([("index", pa.int64()), *parquet_schema(shape)]), io.BytesIO()
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
                completed[number] = _count_errors(plan, number, path)
        except (ValueError, OSError, msgspec.DecodeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            log.warning(f"{printable(path)} is not whole and is predicted again: {reason}")
    return completed


class _IndexedRow(CompletedRow, frozen=True, kw_only=True):
    index: int


def _count_errors(plan: Plan, number: int, path: Path) -> int:
    """Number of error rows in a part; ValueError if its rows are not of its inputs, by index and path."""
    if plan.job.format == "jsonl":
        lines = path.read_bytes()
        if not lines.endswith(b"\n"):
            raise ValueError("its last row is cut short")
        rows = msgspec.json.Decoder(_IndexedRow).decode_lines(lines)
    else:
        _, pq = import_parquet()
        columns = pq.read_table(path, columns=["index", "path", "status"])  # its errors are ValueErrors
        rows = msgspec.convert(columns.to_pylist(), list[_IndexedRow])
    names = [printable(one.path) for one in plan.inputs(number)]
    if [(row.index, row.path) for row in rows] != list(enumerate(names, number * plan.job.part_rows)):
        raise ValueError("its rows are not those of its inputs")
    return sum(row.status == "error" for row in rows)
