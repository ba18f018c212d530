"""Runs `alexnet predict`: finds inputs, predicts, and writes rows. Imports neither torch nor train."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from types import FrameType

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import CorruptFileError, UserError, name_continuation
from data_pipeline.common.streams import binary_stdout
from data_pipeline.decode.header import image_readers
from infer.bundle.load import Bundle
from infer.predict.feature_files import info_of, open_features
from infer.predict.gallery import open_gallery
from infer.predict.inputs import Inputs, find_inputs
from infer.predict.options import PredictOptions, check_options, check_outputs, how_to_go_on
from infer.predict.resume import check_saved_identity, identity_of, save_identity, skip_completed
from infer.predict.rows import ErrorRow, RowShape, names_of
from infer.predict.table import RowCounter, Summary, open_table
from infer.predict.truth import Ranks, open_truth
from infer.predict.writers import Format, RowWriter, open_output
from infer.predictor import Predictor
from infer.runtime.choose import probe_machine

log = logging.getLogger("infer")


def run_predict(options: PredictOptions, verified_bundle: Callable[[], Bundle]) -> Summary:
    """Predict images and write a row for each, in order, as batches finish.

    Args:
        options: of the command.
        verified_bundle: waits until the bundle that `options.model` names is verified, and gives it.
    Returns:
        Counts, and what the prediction ran on; they are logged as well.
    Raises:
        UserError: no images, no model, a backend or device that is not available, or rows to resume that are
            of other inputs.
        CorruptFileError: a bundle that was changed; with `strict`, an input that cannot be read.
    """
    format = check_options(options)
    if options.engine == "ray":
        from infer.ray.driver import predict_on_ray

        assert format in ("jsonl", "parquet")
        return predict_on_ray(options, format, verified_bundle)
    return _predict_here(options, format, verified_bundle)


def _predict_here(options: PredictOptions, format: Format, verified_bundle: Callable[[], Bundle]) -> Summary:
    inputs = find_inputs(options.paths, recursive=options.recursive)
    check_outputs(options, format, inputs)
    # Imported while the bundle is being verified, since both take a while.
    probe_machine()
    image_readers()
    with ExitStack() as stack:
        predictor = stack.enter_context(
            Predictor(verified_bundle(), expected=inputs.total, **options.for_predictor())
        )
        log.info(f"model: {predictor.bundle.folder}")
        log.info(f"runs on: {predictor.runs_on}")
        truth = None if options.truth is None else open_truth(options.truth, predictor.bundle, inputs)
        identity = identity_of(predictor.bundle, options)
        ranks = None if truth is None else Ranks()
        items, kept, kept_errors = iter(inputs), 0, 0
        shape = predictor.row_shape._replace(truth=truth is not None)
        if options.resume:
            assert options.output is not None and format != "table" and format != "features"
            check_saved_identity(format, options.output, identity)
            kept, kept_errors = skip_completed(format, options.output, shape, items, ranks)
            log.info(f"--resume: {kept} rows are there already, {kept_errors} of them errors")
        counter = RowCounter(predictor.backend, predictor.load_s, ranks)
        writer = stack.enter_context(_open_writer(options, format, shape, predictor))
        if options.output is not None and format not in ("table", "features"):
            save_identity(options.output, identity)
        gallery = None
        if options.html is not None:
            gallery = stack.enter_context(open_gallery(options.html, predictor.bundle, counter))
        # Rows that a person sees as they come are progress enough; a bar would be drawn into them.
        shown = options.output is not None or not sys.stdout.isatty()
        total = None if inputs.total is None else inputs.total - kept
        progress = stack.enter_context(show_progress("predict", total, shown=shown))
        stack.enter_context(name_continuation(how_to_go_on(options, format)))
        class_at = None if truth is None else truth.class_at
        rows = stack.enter_context(
            closing(predictor.rows(items, keep_pixels=gallery is not None, class_at=class_at))
        )
        stack.enter_context(_stop_on_interrupt(inputs))  # ends before the rows, which join their threads
        for one in counter.count(rows):
            writer.write(one.row)
            if gallery is not None:
                gallery.write(one)
            if options.strict and isinstance(one.row, ErrorRow):
                raise CorruptFileError(f"{one.row.path}: {one.row.error} (--strict)")
            progress.advance(1)
    summary = counter.summary(kept, kept_errors, inputs.passed_over)
    log.info(summary.sentence())
    if truth is not None and truth.num_unused and not options.resume:
        log.info(f"--truth: {truth.num_unused} path(s) of {options.truth} are no inputs")
    if not kept + counter.images:
        raise UserError("the lists and shards that were given name no images")
    return summary


@contextmanager
def _stop_on_interrupt(inputs: Inputs) -> Iterator[None]:
    """Ends the inputs from stdin at Ctrl-C, or an error, before the threads that wait for them are joined."""

    def stop(signum: int, frame: FrameType | None) -> None:
        inputs.stopped.set()
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    ours = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        inputs.stopped.set()
        if ours:
            signal.signal(signal.SIGINT, before)


def _open_writer(
    options: PredictOptions, format: Format, shape: RowShape, predictor: Predictor
) -> AbstractContextManager[RowWriter]:
    if format == "table":
        return open_table(options.output, names_of(predictor.bundle), shape.places, shape.truth)
    if format == "features":
        assert options.output is not None
        return open_features(options.output, info_of(predictor.bundle, ten_crop=options.ten_crop))
    return open_output(format, options.output, shape, append=options.resume, stdout=binary_stdout())
