"""Drives `alexnet predict --engine ray`: plans a job, and has Ray Data's actors predict its parts."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import WorkerError, name_continuation
from data_pipeline.common.files import write_atomic
from data_pipeline.common.passed_over import PassedOver
from data_pipeline.common.start import START
from data_pipeline.common.text import printable
from infer.bundle.load import Bundle
from infer.predict.inputs import find_inputs
from infer.predict.options import PredictOptions, how_to_go_on
from infer.predict.resume import identity_of
from infer.predict.table import Summary
from infer.ray.cluster import ray_cluster, share_cluster
from infer.ray.job_folder import SUMMARY_NAME, PartFormat, Plan, plan_job
from infer.ray.parts import PartResult, PartWorker, completed_parts

log = logging.getLogger("infer")

_MAX_BLOCKS = 1000
"""Most blocks of Ray Data, since each costs the driver some milliseconds."""


def predict_on_ray(
    options: PredictOptions, format: PartFormat, verified_bundle: Callable[[], Bundle]
) -> Summary:
    """Predict into a folder of parts, on a Ray cluster.

    Args:
        options: of the command.
        format: of the parts.
        verified_bundle: waits until the bundle that `options.model` names is verified, and gives it.
    Returns:
        Counts over all parts, and what they ran on; they are logged and written to the folder as well.
    Raises:
        UserError: no model, inputs or folder that a worker cannot see, or a job of other inputs.
        CorruptFileError: a bundle that was changed, or with `strict` an input that cannot be read.
        WorkerError: a worker that failed in an unforeseen way.
    """
    assert options.output is not None
    folder, bundle = options.output.resolve(), verified_bundle()
    log.info(f"model: {bundle.folder}")
    inputs = find_inputs(options.paths, recursive=options.recursive)
    plan = plan_job(folder, inputs, options, format, identity_of(bundle, options))
    (folder / SUMMARY_NAME).unlink(missing_ok=True)
    completed = completed_parts(plan)
    if options.resume:
        log.info(f"--resume: {len(completed)} of {plan.num_parts} parts are there already")
    missing = [number for number in range(plan.num_parts) if number not in completed]
    started, seconds, results = time.perf_counter(), 0.0, []
    if missing:
        total = sum(min(plan.job.part_rows, plan.num_inputs - n * plan.job.part_rows) for n in missing)
        with (
            name_continuation(how_to_go_on(options, format)),
            ray_cluster(options) as ray,
            show_progress("predict", total) as progress,
        ):
            for result in _predict_parts(ray, options, plan, bundle, missing):
                results.append(result)
                progress.advance(result.summary.images)
                seconds = time.perf_counter() - started  # with the start of Ray, without its end
    summary = _sum_up(plan, results, sum(completed.values()), seconds, inputs.passed_over)
    write_atomic(folder / SUMMARY_NAME, msgspec.json.encode(summary))
    log.info(f"{plan.num_parts} parts in {printable(folder)}: {summary.sentence()}")
    return summary


def _predict_parts(
    ray: Any, options: PredictOptions, plan: Plan, bundle: Bundle, missing: list[int]
) -> Iterator[PartResult]:
    """The results of parts, as they come; a failure of one is raised."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    share = share_cluster([(int(n.get("CPU", 0)), int(n.get("GPU", 0))) for n in nodes], options)
    workers = min(share.workers, len(missing))
    each = f"{share.threads} thread{'s' * (share.threads > 1)}{' and a GPU' * share.gpus}"
    log.info(f"Ray {ray.__version__}: {workers} worker{'s' * (workers > 1)}, each with {each}")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    settings = {**options.for_predictor(), "threads": share.threads}
    if not share.gpus:
        settings["device"] = "cpu"
    numbers = ray.data.from_items(missing, override_num_blocks=min(len(missing), _MAX_BLOCKS))
    arguments = (plan, bundle.folder.resolve(), options.strict, settings)
    rows = numbers.map(  # Ray restarts an actor that dies, and gives its part to another
        _make_worker_class(),
        fn_constructor_args=(str(START), pickle.dumps((PartWorker, arguments))),
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=share.threads,
        num_gpus=share.gpus,
    ).iter_rows()
    logged = set[str]()
    for result in _items(rows):
        if isinstance(result, Exception):
            raise result
        if result.runs_on not in logged:
            logged.add(result.runs_on)
            log.info(f"runs on: {result.runs_on} ({result.host})")
        yield result


def _make_worker_class() -> type[Any]:
    """A class that Ray sends whole: a worker imports ours by its name, in the driver's folder first."""

    class Worker:
        """A `PartWorker` of the packages that this machine has installed."""

        def __init__(self, start: str, pickled: bytes) -> None:
            import pickle
            import runpy
            from pathlib import Path

            if Path(start).is_file():  # another machine may have them elsewhere
                runpy.run_path(start)["import_own"]("data_pipeline", "infer")
            make, arguments = pickle.loads(pickled)
            self._worker = make(*arguments)

        def __call__(self, row: dict[str, int]) -> Any:
            """See `PartWorker`."""
            return self._worker(row)

    return Worker


def _items(rows: Iterator[dict[str, Any]]) -> Iterator[PartResult | Exception]:
    try:
        for row in rows:
            yield row["item"]
    except Exception as error:  # Ray's exceptions share no base but this
        last = str(error).strip().rpartition("\n")[2].strip()
        raise WorkerError(f"a Ray worker failed: {type(error).__name__}: {last}") from error


def _sum_up(
    plan: Plan, results: list[PartResult], kept_errors: int, seconds: float, passed_over: PassedOver
) -> Summary:
    parts, num_hosts = [one.summary for one in results], len({one.host for one in results})
    images = sum(part.images for part in parts)
    ran = {
        name: ", ".join(sorted({getattr(part, name) for part in parts})) or "nothing left to do"
        for name in ("backend", "provider", "device", "precision")
    }
    if num_hosts > 1:
        ran["device"] += f" of {num_hosts} machines"
    return Summary(
        images=images,
        errors=sum(part.errors for part in parts),
        kept=plan.num_inputs - images,
        kept_errors=kept_errors,
        seconds=seconds,
        images_per_s=images / seconds if seconds else 0.0,
        start_s=max((part.start_s for part in parts), default=0.0),
        passed_over=passed_over.by_count,
        **ran,
    )
