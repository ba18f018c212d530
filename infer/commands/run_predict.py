"""`alexnet predict`: inputs found, rows predicted, counted, written, summed up; without torch and train."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.text import printable, visible
from data_pipeline.decode.pillow import image_readers
from infer.bundle.load import Bundle
from infer.predict.inputs import STDIN, find_inputs
from infer.predict.options import PredictOptions
from infer.predict.resume import check_saved_identity, identity_of, save_identity
from infer.predict.rows import ErrorRow, SeenRow
from infer.predict.table import RowCounter, Summary, TableWriter
from infer.predict.writers import SUFFIXES, Format, RowWriter, has_rows, kept_rows, open_output, skip_kept
from infer.predictor import Predictor
from infer.runtime.choose import probe_machine

log = logging.getLogger("infer")

TABLE_FILE_WIDTH = 120
"""Columns of a table that goes to a file or a pipe."""


def predict_images(options: PredictOptions, verified: Callable[[], Bundle] | None = None) -> Summary:
    """Predict images, and write a row for each, in order, as batches finish.

    Args:
        options: what is wanted.
        verified: gives the bundle that `options.model` names, once it is verified; None to do that here.
    Returns:
        Counts, and what really ran; also said on stderr.
    Raises:
        UserError: no images, no model, a backend or device that cannot be had, or rows to go on with that are
            of other inputs.
        CorruptFileError: a bundle that was changed; with `strict`, an input that cannot be read.
    """
    if list(options.paths).count(STDIN) > 1:
        raise UserError("- is given twice: there is one stdin")
    if options.engine == "ray":
        from infer.ray.engine import predict_on_ray

        return predict_on_ray(options)
    format = _format_of(options)
    if options.html is not None and options.resume:
        raise UserError("--html with --resume: a gallery shows one whole run; leave one of them out")
    if options.html is not None and options.html == options.output:
        raise UserError("--html and --output name the same file")
    inputs = find_inputs(options.paths, recursive=options.recursive)
    # Imported while the bundle is being verified, since both take a while.
    probe_machine()
    image_readers()
    with ExitStack() as stack:
        predictor = stack.enter_context(
            Predictor(
                verified() if verified is not None else options.model,
                backend=options.backend,
                device=options.device,
                decoder=options.decoder,
                top=options.top,
                batch_size=options.batch_size,
                min_probability=options.min_probability,
                ten_crop=options.ten_crop,
                expected=inputs.total,
            )
        )
        log.info(f"model: {predictor.bundle.folder}")
        log.info(f"runs on: {predictor.runs_on}")
        items, kept, kept_errors = iter(inputs), 0, 0
        identity = identity_of(
            predictor.bundle,
            top=predictor.top,
            min_probability=options.min_probability,
            ten_crop=options.ten_crop,
        )
        if options.resume:
            assert options.output is not None
            if has_rows(format, options.output):
                check_saved_identity(options.output, identity)
            rows = kept_rows(format, options.output, predictor.top)
            kept, kept_errors = skip_kept(rows, items, format, options.output)
            log.info(f"--resume: {kept} rows are there already, {kept_errors} of them errors")
        counter = RowCounter(predictor.backend)
        writer = stack.enter_context(_open_writer(format, options, predictor))
        if options.output is not None and format != "table":
            save_identity(options.output, identity)
        seen: Iterator[SeenRow] = (SeenRow(row, None) for row in counter.count(predictor(items)))
        if options.html is not None:
            from infer.predict.gallery import open_gallery

            gallery = stack.enter_context(open_gallery(options.html, predictor.bundle, counter))
            seen = counter.count_seen(predictor.seen(items))
        # Rows that a person sees as they come are progress enough; a bar would be drawn into them.
        shown = options.output is not None or not sys.stdout.isatty()
        total = None if inputs.total is None else inputs.total - kept
        for one in _with_progress(seen, total, shown):
            writer.write(one.row)
            if options.html is not None:
                gallery.write(one)
            if options.strict and isinstance(one.row, ErrorRow):
                raise CorruptFileError(f"{one.row.path}: {one.row.error} (--strict)")
    summary = counter.summary(kept, kept_errors)
    log.info(summary.sentence())
    if not kept + counter.images:
        raise UserError("the lists and shards that were given name no images")
    return summary


def _format_of(options: PredictOptions) -> Format:
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
    return format


@contextmanager
def _open_writer(format: Format, options: PredictOptions, predictor: Predictor) -> Iterator[RowWriter]:
    output = options.output
    if format != "table":
        with open_output(
            format, output, predictor.top, append=options.resume, stdout=sys.stdout.buffer
        ) as writer:
            yield writer
        return
    from rich.cells import cell_len
    from rich.console import Console

    cells = max(cell_len(visible(label)) for label in predictor.bundle.manifest.class_labels)
    if output is None:
        width = None if sys.stdout.isatty() else TABLE_FILE_WIDTH
        yield TableWriter(Console(width=width), predictor.top, cells)
        return
    try:
        file = output.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {printable(output)}: {error.strerror or error}") from error
    with file:
        yield TableWriter(Console(file=file, width=TABLE_FILE_WIDTH), predictor.top, cells)


def _with_progress(rows: Iterable[SeenRow], total: int | None, shown: bool) -> Iterator[SeenRow]:
    with show_progress("predict", total, shown=shown) as progress:
        for row in rows:
            yield row
            progress.advance(1)
