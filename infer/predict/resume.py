"""Resuming a run: the rows that a file has already, and whether they are of the same model and options."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import sha256_of, write_atomic
from data_pipeline.common.text import printable
from infer.bundle.load import Bundle
from infer.bundle.schema import MANIFEST_NAME
from infer.predict.inputs import Item, path_of
from infer.predict.options import PredictOptions
from infer.predict.rows import CompletedRow, Rank, RowShape, check_top
from infer.predict.truth import FOLDER, Ranks
from infer.predict.writers import FileFormat, csv_columns, journal_of, restore_journal, safe_cell

log = logging.getLogger("infer")


class RunIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The model and the options that decide the content of a row.

    The decoder, the backend, the device and the batch size are not among them: they change the last digits of
    a probability.

    Attributes:
        model_sha256: of the bundle's manifest, which holds the hashes of its files.
        top: classes in a row.
        min_probability: classes below are left out.
        ten_crop: whether ten views of each image are averaged.
        truth: where the true classes are from; "none" for rows without.
    """

    model_sha256: str
    top: int
    min_probability: float
    ten_crop: bool
    truth: str = "none"


def identity_of(bundle: Bundle, options: PredictOptions) -> RunIdentity:
    """The identity of a run of these options with a verified bundle.

    Raises:
        UserError: `top` is out of range.
    """
    return RunIdentity(
        model_sha256=manifest_file_sha256(bundle),
        top=check_top(bundle, options.top),
        min_probability=options.min_probability,
        ten_crop=options.ten_crop,
        truth=_describe_truth(options.truth),
    )


def _describe_truth(option: str | None) -> str:
    if option is None or option == FOLDER:
        return option or "none"
    return f"a file with SHA-256 {sha256_of(Path(option))[:16]}…"


def manifest_file_sha256(bundle: Bundle) -> str:
    """SHA-256 of the file `bundle.json`, which identifies the model."""
    return sha256_of(bundle.folder / MANIFEST_NAME)


def check_identity(begun: RunIdentity, now: RunIdentity, rows: Path) -> None:
    """Refuse to resume with another model or other options than the rows were begun with.

    Raises:
        UserError: they differ; names the first difference.
    """
    where = f"--resume: the rows in {printable(rows)}"
    if begun.model_sha256 != now.model_sha256:
        raise UserError(
            f"{where} are of another model (its bundle.json has SHA-256 {begun.model_sha256[:12]}…): "
            "give that one as --model, or another --output"
        )
    check_same(begun, now, ("top", "min_probability", "ten_crop", "truth"), where)


def check_same(begun: msgspec.Struct, now: msgspec.Struct, options: Sequence[str], where: str) -> None:
    """Raise a UserError that names the first of some options that differs between two runs."""
    for name in options:
        before, after = getattr(begun, name), getattr(now, name)
        if before != after:
            raise UserError(
                f"{where} were begun with {name} {before}, and now it is {after}: "
                f"give --{name.replace('_', '-')} as it was, or another --output"
            )


def check_saved_identity(format: FileFormat, rows: Path, now: RunIdentity) -> None:
    """Compare a run with the identity saved beside its rows; logs a warning where none was saved.

    Raises:
        UserError: the rows are of another model or other options.
        CorruptFileError: the saved identity is damaged.
    """
    files = (rows, journal_of(rows)) if format == "parquet" else (rows,)
    if not any(file.is_file() and file.stat().st_size for file in files):
        return
    path = _identity_path(rows)
    try:
        begun = msgspec.json.decode(path.read_bytes(), type=RunIdentity)
    except FileNotFoundError:
        message = "%s is not there: nobody knows whether the rows in %s are of this model"
        log.warning(message, printable(path), printable(rows))
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(
            f"{printable(path)} is damaged: {error}; remove it to go on without this check"
        ) from error
    else:
        check_identity(begun, now, rows)


def save_identity(rows: Path, identity: RunIdentity) -> None:
    """Save the identity beside a file of rows, unless that is no plain file, such as /dev/null."""
    path = _identity_path(rows)
    if not rows.exists() or rows.is_file():
        try:
            write_atomic(path, msgspec.json.encode(identity))  # which follows no link
        except OSError as error:
            log.warning("cannot write %s: --resume will not know the model", printable(path))
            log.debug("%s", error)


def _identity_path(rows: Path) -> Path:
    return rows.with_name(f".{rows.name}.run.json")


def skip_completed(
    format: FileFormat, output: Path, shape: RowShape, items: Iterator[Item], ranks: Ranks | None = None
) -> tuple[int, int]:
    """Take the inputs that have a row already from `items`.

    Args:
        format, output: the file of the earlier run.
        shape: of the rows.
        items: the inputs of this run.
        ranks: counts the places of the rows' true classes; None where they have none.
    Returns:
        How many rows there are, and how many of them are errors.
    Raises:
        UserError: the rows are not those of the first inputs.
        UserError, CorruptFileError: see `completed_rows`.
    """
    rows = errors = 0
    for row in completed_rows(format, output, shape):
        item = next(items, None)
        if item is None:
            raise UserError(f"--resume: {printable(output)} has more rows than there are inputs")
        path = printable(path_of(item))
        if row.path != (safe_cell(path) if format == "csv" else path):
            raise UserError(
                f"--resume: row {rows + 1} of {printable(output)} is of {row.path}, and that input "
                f"is {path}: give the inputs that it was begun with, or another --output"
            )
        if ranks is not None and row.truth is not None:
            ranks[row.truth.rank] += 1
        rows, errors = rows + 1, errors + (row.status == "error")
    return rows, errors


def completed_rows(format: FileFormat, output: Path, shape: RowShape) -> Iterator[CompletedRow]:
    """The rows that an output file has; cuts off a last line that was written in part, and logs that.

    Args:
        format, output, shape: see `skip_completed`.
    Raises:
        CorruptFileError: a file that holds something else.
        UserError: a CSV or Parquet file with other columns.
    """
    if format == "parquet":
        journal = journal_of(output)
        if not journal.exists() and output.exists():
            restore_journal(output, shape)
        format, output = "jsonl", journal
    if not output.exists():
        return
    complete_bytes = 0
    with output.open("rb") as file:
        for number, record in enumerate(_records(file, quoted=format == "csv")):
            if not record.endswith(b"\n"):
                break
            row = _parse(record, format, number, output, shape)
            complete_bytes += len(record)
            if row is not None:
                yield row
    if complete_bytes < output.stat().st_size:
        log.warning("%s ended within a row, which is done again", printable(output))
        os.truncate(output, complete_bytes)


def _records(file: BinaryIO, quoted: bool) -> Iterator[bytes]:
    """Lines; a CSV record continues on the next line while a quote is open."""
    record = b""
    for line in file:
        record += line
        if not quoted or record.count(b'"') % 2 == 0:
            yield record
            record = b""
    if record:
        yield record.removesuffix(b"\n")  # a quote is open, so the record is incomplete


def _parse(
    record: bytes, format: FileFormat, number: int, output: Path, shape: RowShape
) -> CompletedRow | None:
    """One record of a file; None for the header of CSV."""
    try:
        if format == "jsonl":
            return msgspec.json.decode(record, type=CompletedRow)
        (cells,) = csv.reader(io.StringIO(record.decode(), newline=""), strict=True)
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise CorruptFileError(f"row {number + 1} of {printable(output)} is damaged: {error}") from error
    if number == 0:
        if cells != csv_columns(shape):
            raise UserError(
                f"--resume: {printable(output)} has other columns; give --top and --truth as before"
            )
        return None
    rank = cells[-1] if shape.truth else ""
    whole = len(cells) == len(csv_columns(shape)) and cells[1] in ("ok", "error")
    if not whole or (rank and not rank.isdecimal()):
        raise CorruptFileError(f"row {number + 1} of {printable(output)} is damaged: {len(cells)} cells")
    return CompletedRow(cells[0], "ok" if cells[1] == "ok" else "error", Rank(int(rank)) if rank else None)
