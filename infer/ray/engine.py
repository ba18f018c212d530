"""`alexnet predict --engine ray`: parts of a job, done by a pool of workers that each load the model once."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import CorruptFileError, SaveError, UserError
from data_pipeline.common.files import write_atomic
from data_pipeline.common.text import printable
from infer.bundle.load import Bundle, find_bundle, load_bundle
from infer.predict.inputs import find_inputs
from infer.predict.resume import identity_of
from infer.predict.rows import check_top
from infer.predict.table import Summary
from infer.predict.writers import import_parquet
from infer.ray.cluster import LOCAL, Share, failed_worker, machines_of, ray_cluster, share_cores, share_gpus
from infer.ray.job_folder import SUMMARY_NAME, JobFolder, PartFormat, digest_of, plan_job
from infer.ray.part_files import KeptPart, kept_parts, remove_leftovers
from infer.ray.worker import PartResult, PartWorker, WorkerOptions

if TYPE_CHECKING:
    from infer.predict.options import PredictOptions

log = logging.getLogger("infer")

_MAX_BLOCKS = 1000


def predict_on_ray(options: PredictOptions) -> Summary:
    """Predict into a folder of parts, on a Ray cluster.

    Returns:
        Counts over all parts, and what really ran; also said on stderr, and kept in the folder.
    Raises:
        UserError: wrong use, no model, inputs or folder that a worker cannot see, or a job of other inputs.
        CorruptFileError: a bundle that was changed, or with `strict` an input that cannot be read.
        WorkerError: a worker that ended for a reason that nobody foresaw.
    """
    format = _checked_format(options)
    assert options.output is not None
    folder = options.output.resolve()
    if format == "parquet":
        import_parquet()
    bundle = load_bundle(find_bundle(options.model))
    log.info(f"model: {bundle.folder}")
    identity = identity_of(
        bundle,
        top=check_top(bundle, options.top),
        min_probability=options.min_probability,
        ten_crop=options.ten_crop,
    )
    inputs = find_inputs(options.paths, recursive=options.recursive)
    job = plan_job(
        folder,
        inputs,
        format=format,
        identity=identity,
        part_rows=options.part_rows,
        total=inputs.total,
        resume=options.resume,
    )
    remove_leftovers(folder)
    (folder / SUMMARY_NAME).unlink(missing_ok=True)
    kept = list(_kept(job)) if options.resume else []
    done = {part.number for part in kept}
    missing = [number for number in range(len(job.job.parts)) if number not in done]
    if options.resume:
        log.info(f"--resume: {len(kept)} of {len(job.job.parts)} parts are there already")
    started, seconds = time.perf_counter(), 0.0
    results: list[PartResult] = []
    for result in _run(options, job, bundle, missing, sum(part.rows for part in kept)) if missing else ():
        results.append(result)
        seconds = time.perf_counter() - started  # with Ray's start, and without its end
    for number in missing:
        if not job.part_path(number).exists():
            raise SaveError(
                f"{printable(job.part_path(number))} was written by a worker and is not here: "
                "--output must be a folder that all machines share, at one path"
            )
    summary = _summary(results, kept, seconds)
    write_atomic(folder / SUMMARY_NAME, msgspec.json.encode(summary))
    log.info(f"{len(job.job.parts)} parts in {printable(folder)}: {summary.sentence()}")
    return summary


def _checked_format(options: PredictOptions) -> PartFormat:
    if options.output is None:
        raise UserError("--engine ray writes a folder of parts: name it with --output DIR")
    if options.html is not None:
        raise UserError("--html with --engine ray: a gallery is made by one process; leave one of them out")
    if options.format in ("table", "csv"):
        raise UserError(f"--format {options.format} with --engine ray: use jsonl or parquet")
    return "jsonl" if options.format == "jsonl" else "parquet"


def _kept(job: JobFolder) -> Iterator[KeptPart]:
    for part in kept_parts(job):
        if isinstance(part, KeptPart):
            yield part
        else:
            log.warning(part)


def _run(
    options: PredictOptions, job: JobFolder, bundle: Bundle, missing: list[int], kept_rows: int
) -> Iterator[PartResult]:
    """The results of parts, as they come; a failure ends the run."""
    no_gpus = options.device == "cpu"
    with ray_cluster(options.address or LOCAL, workers=options.workers, no_gpus=no_gpus) as ray:
        share = share_cluster(machines_of(ray), options)
        told = WorkerOptions(
            folder=str(job.folder),
            job_sha256=digest_of(job.folder),
            model=str(bundle.folder.resolve()),
            backend=options.backend,
            device=options.device if share.gpus else "cpu",
            decoder=options.decoder,
            batch_size=options.batch_size,
            threads=share.threads,
            strict=options.strict,
        )
        workers = min(share.workers, len(missing))
        each = f"{share.threads} thread{'s' * (share.threads > 1)}{' and a GPU' * share.gpus}"
        log.info(f"Ray {ray.__version__}: {workers} worker{'s' * (workers > 1)}, each with {each}")
        said: set[str] = set()
        total = job.job.num_inputs - kept_rows
        with show_progress("predict", total, shown=True) as progress:
            for result in _results(ray, told, share, missing):
                if result.failure:
                    raise _failure(result)
                if result.runs_on not in said:
                    said.add(result.runs_on)
                    log.info(f"runs on: {result.runs_on} ({result.host})")
                progress.advance(result.images)
                yield result


def share_cluster(machines: list[tuple[int, int]], options: PredictOptions) -> Share:
    """How many workers, and what each holds: a GPU where there are any, unless they are not wanted.

    Args:
        machines: cores and GPUs of each machine.
        options: the command's.
    Raises:
        UserError: a GPU was asked for and there is none, or more workers than there is room for.
    """
    has_gpu = any(gpus for _, gpus in machines)
    if not has_gpu and (options.device == "cuda" or options.backend == "trt"):
        what = "--device cuda" if options.device == "cuda" else "--backend trt"
        raise UserError(f"{what} cannot be had: the Ray cluster has no GPU")
    if has_gpu and options.device != "cpu":
        return share_gpus(machines, options.workers)
    return share_cores([cores for cores, _ in machines], options.workers)


def _results(ray: Any, told: WorkerOptions, share: Share, missing: list[int]) -> Iterator[PartResult]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data = ray.data.from_items(missing, override_num_blocks=min(len(missing), _MAX_BLOCKS)).map_batches(
        PartWorker,
        fn_constructor_args=(msgspec.json.encode(told).decode(),),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            size=min(share.workers, len(missing)), max_tasks_in_flight_per_actor=1
        ),
        num_cpus=share.threads,
        num_gpus=share.gpus,
    )
    rows = iter(data.iter_rows())
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # Ray's exceptions share no base but this
            raise failed_worker(error) from error
        if row is None:
            return
        yield msgspec.json.decode(row["result"], type=PartResult)


def _failure(result: PartResult) -> Exception:
    return UserError(result.failure) if result.exit_code == 2 else CorruptFileError(result.failure)


def _summary(results: list[PartResult], kept: list[KeptPart], seconds: float) -> Summary:
    images = sum(result.images for result in results)

    def said(name: str) -> str:
        values = sorted({getattr(result, name) for result in results})
        return ", ".join(values) or "nothing left to do"

    workers = len({result.host for result in results})
    return Summary(
        images=images,
        errors=sum(result.errors for result in results),
        kept=sum(part.rows for part in kept),
        kept_errors=sum(part.errors for part in kept),
        seconds=seconds,
        images_per_s=images / seconds if seconds and images else 0.0,
        backend=said("backend"),
        provider=said("provider"),
        device=said("device") + (f" of {workers} machines" if workers > 1 else ""),
        precision=said("precision"),
    )
