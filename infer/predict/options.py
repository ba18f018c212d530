"""The options of `alexnet predict`, and what is refused before the work: wrong options, files of others.

What it may write to are new files, and its own rows and galleries where that is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import read_head
from data_pipeline.common.text import printable
from data_pipeline.results.outputs import check_output, is_same_place
from infer.bundle.schema import FeatureLayer
from infer.predict.decode import DecoderName
from infer.predict.feature_files import FEATURE_SUFFIXES, feature_files, is_features
from infer.predict.gallery import GENERATOR
from infer.predict.inputs import Inputs
from infer.predict.lists import STDIN
from infer.predict.rows import DEFAULT_BATCH, CompletedRow, RowShape
from infer.predict.writers import SUFFIXES, Format, csv_columns, journal_of, parquet_footer
from infer.runtime.choose import BackendName, DeviceName

_CSV = ",".join(csv_columns(RowShape(1, named=False))[:4]).encode()
_JSONL = b'{"path":"'
_TABLE = re.compile(rb"(\x1b\[[\d;]*m)?image +#1[ \n]")  # coloured where the environment asks for it
_PARQUET = b"PAR1"
_HEAD_BYTES = 1 << 16


class PredictOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The command's options, as the command line gives them.

    Attributes:
        paths: see `infer.predict.inputs.find_inputs`.
        model: a bundle; None for the newest export, which is named on stderr.
        backend, device, decoder, top, batch_size, min_probability, ten_crop: see `infer.predictor.Predictor`.
        features: a layer; `output` is then a file of its features, see `infer.predict.feature_files`.
        recursive: whether to enter folders inside folders.
        strict: stop with an error at the first input that cannot be read.
        resume: continue after the rows that `output` has.
        overwrite: replace the rows that `output` has, and the gallery.
        format: of the rows; None to take it from the name of `output`, else a table.
        output: the file to write; None for stdout.
        html: a gallery to write as well.
        truth: where the true classes are from, see `infer.predict.truth.open_truth`; None for rows without.
        engine: `local` predicts in this process; `ray` by workers of a Ray cluster, which write a folder of
            parts.
        address: of the Ray cluster; None to start one on this machine.
        workers: number of Ray workers; None for as many as the cluster has room for.
        part_rows: inputs in a part; None to choose by the number of inputs.
    """

    paths: Sequence[str]
    model: Path | None = None
    backend: BackendName = "auto"
    device: DeviceName = "auto"
    decoder: DecoderName = "auto"
    top: int | None = None
    batch_size: int = DEFAULT_BATCH
    min_probability: float = 0.0
    ten_crop: bool = False
    features: FeatureLayer | None = None
    recursive: bool = True
    strict: bool = False
    resume: bool = False
    overwrite: bool = False
    format: Format | None = None
    output: Path | None = None
    html: Path | None = None
    truth: str | None = None
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    workers: int | None = None
    part_rows: int | None = None

    def for_predictor(self) -> dict[str, Any]:
        """The keyword arguments of a `Predictor`."""
        names = (
            "backend",
            "device",
            "decoder",
            "top",
            "batch_size",
            "min_probability",
            "ten_crop",
            "features",
        )
        return {name: getattr(self, name) for name in names}


def check_options(options: PredictOptions) -> Format:
    """The format of the rows.

    Raises:
        UserError: options that exclude each other, or that need another.
    """
    if list(options.paths).count(STDIN) > 1:
        raise UserError("- is given twice: there is one stdin")
    if options.overwrite and options.resume:
        raise UserError("--overwrite with --resume: rows are replaced, or kept; leave one of them out")
    if options.overwrite and options.output is None and options.html is None:
        raise UserError("--overwrite replaces a file: name it with --output or --html")
    if options.features is not None:
        return _check_features(options)
    return _check_ray(options) if options.engine == "ray" else _check_local(options)


def _check_local(options: PredictOptions) -> Format:
    suffix = options.output.suffix.lower() if options.output is not None else ""
    format: Format = options.format or SUFFIXES.get(suffix, "table")
    if options.resume and options.output is None:
        raise UserError("--resume goes on with a file: name it with --output")
    if options.resume and format == "table":
        raise UserError("--resume needs --format jsonl, csv or parquet: a table cannot be read back")
    for name in ("address", "workers", "part_rows"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for --engine ray")
    if format == "parquet" and options.output is None:
        raise UserError("--format parquet needs a file: --output rows.parquet")
    if options.html is not None and options.resume:
        raise UserError("--html with --resume: a gallery shows one whole run; leave one of them out")
    return format


def _check_features(options: PredictOptions) -> Format:
    whole = "a file of features is written whole or not at all"
    no_classes = "a file of features holds no classes"
    refused = {
        "--engine ray": (options.engine == "ray", "features are written by one process"),
        "--resume": (options.resume, whole),
        "--format": (options.format is not None, "the suffix of --output decides"),
        "--top": (options.top is not None and options.html is None, no_classes),
        "--min-probability": (options.min_probability > 0 and options.html is None, no_classes),
    }
    for name, (given, why) in refused.items():
        if given:
            raise UserError(f"{name} with --features: {why}; leave one of them out")
    if options.output is None or options.output.suffix.lower() not in FEATURE_SUFFIXES:
        raise UserError("--features writes a file: name it with --output FILE.parquet or FILE.npy")
    return "features"


def _check_ray(options: PredictOptions) -> Format:
    if options.output is None:
        raise UserError("--engine ray writes a folder of parts: name it with --output DIR")
    if options.html is not None:
        raise UserError("--html with --engine ray: a gallery is made by one process; leave one of them out")
    if options.truth is not None:
        raise UserError("--truth with --engine ray: predict with --engine local, or leave --truth out")
    if options.format in ("table", "csv"):
        raise UserError(f"--format {options.format} with --engine ray: use jsonl or parquet")
    return options.format or "parquet"


def how_to_go_on(options: PredictOptions, format: Format) -> str:
    """Advice after Ctrl-C, which leaves the rows that are written.

    Args:
        options: of the command.
        format: of the rows.
    """
    if format == "features":
        return "features are written whole or not at all: nothing was kept"
    if options.output is None or format == "table":
        return "rows that can be gone on from need --output and --format jsonl, csv or parquet"
    instead = "" if not options.overwrite else " in place of --overwrite"
    without = "" if options.html is None else ", without --html"
    where = printable(options.output)
    return f"the same command with --resume{instead}{without} goes on after the rows in {where}"


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
    """Return how a file holds rows of predictions; None for a file of something else.

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
