"""What `alexnet predict` may write to: new files, and its own rows and galleries where that is asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import read_head
from data_pipeline.common.outputs import check_output, is_same_place
from data_pipeline.common.text import printable
from infer.predict.feature_files import feature_files, is_features
from infer.predict.gallery import GENERATOR
from infer.predict.inputs import Inputs
from infer.predict.options import PredictOptions
from infer.predict.rows import CompletedRow, RowShape
from infer.predict.writers import Format, csv_columns, journal_of, parquet_footer

_CSV = ",".join(csv_columns(RowShape(1, named=False))[:4]).encode()
_JSONL = b'{"path":"'
_TABLE = re.compile(rb"(\x1b\[[\d;]*m)?image +#1[ \n]")  # coloured where the environment asks for it
_PARQUET = b"PAR1"
_HEAD_BYTES = 1 << 16


def check_outputs(options: PredictOptions, format: Format, inputs: Inputs) -> None:
    """Refuse to replace what is no output of an earlier run, and that, too, unless it is asked for.

    Args:
        options: of the command; its engine is `local`.
        format: of the rows.
        inputs: of the prediction.
    Raises:
        UserError: an output is an input or a list of inputs, holds something else, or holds rows, and neither
            `resume` nor `overwrite` is set; or two outputs are one file.
    """
    if options.output is not None:
        if options.html is not None and is_same_place(options.html, options.output):
            raise UserError("--html and --output name the same file")
        for path, expected in _files(options.output, format):
            _check_rows(path, expected, options, inputs)
    if options.html is not None:
        there = check_output(
            options.html, "--html", is_gallery, "a gallery", named=inputs.named, found=inputs.files()
        )
        if there and not options.overwrite:
            raise UserError(
                f"--html {printable(options.html)} is a gallery of an earlier run: --overwrite replaces it"
            )


def _files(output: Path, format: Format) -> Iterator[tuple[Path, Format]]:
    """The files that hold rows, during the run and after it, and what each holds."""
    yield output, format
    if format == "parquet":
        yield journal_of(output), "jsonl"
    if format == "features":
        for path in feature_files(output)[1:]:
            yield path, "features"


def _check_rows(path: Path, expected: Format, options: PredictOptions, inputs: Inputs) -> None:
    def is_ours(path: Path) -> bool:
        return is_features(path) if expected == "features" else rows_format(path) is not None

    what = "features" if expected == "features" else "rows"
    ours = what if expected == "features" else "rows of predictions"
    there = check_output(path, "--output", is_ours, ours, named=inputs.named, found=inputs.files())
    where = f"{printable(path)} has {what} of an earlier run"
    if there and not (options.resume or options.overwrite):
        resume = "" if expected in ("table", "features") else "--resume goes on after them, "
        raise UserError(f"--output {where}: {resume}--overwrite replaces them")
    if there and options.resume and (found := rows_format(path)) != expected:
        raise UserError(f"--resume: {where} as {found}, and now they are to be {expected}: see --format")


def rows_format(path: Path) -> Format | None:
    """How a file holds rows of predictions; None for a file of something else.

    Rows that end within the first one count, down to its first byte, since a run may be killed there.
    """
    head = read_head(path, _HEAD_BYTES)
    first, end, _ = head.partition(b"\n")
    if head.startswith(_PARQUET):
        columns, footer = (b"path", b"status", b"error", b"predictions", b"class_id"), parquet_footer(path)
        return "parquet" if all(name in footer for name in columns) else None
    if _TABLE.match(head):
        return "table"
    if head and not end:
        starts: dict[Format, bytes] = {"csv": _CSV, "jsonl": _JSONL}
        for kind, start in starts.items():
            if first.startswith(start) or start.startswith(first):
                return kind
        return None
    if first.startswith(_CSV):
        return "csv"
    try:
        msgspec.json.decode(first, type=CompletedRow)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return "jsonl" if b'"predictions"' in first or b'"error"' in first else None


def is_gallery(path: Path) -> bool:
    """Whether a file is a page that `--html` wrote."""
    return GENERATOR.encode() in read_head(path, 4096)
