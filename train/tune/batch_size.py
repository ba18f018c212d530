"""`alexnet bench batch`: which `global_batch` a recipe should have on this machine, and why.

Two things decide. The hardware wants a batch large enough to be busy: from the knee on, where images per
second are at 90% of the most, larger ones only take longer. The gradient wants one not above its noise scale,
since beyond that more samples a step save few steps. Between the two a larger batch costs little, and lets
more ranks take part.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from functools import partial
from timeit import repeat

import msgspec
import torch

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import bytes_available
from train.bench.harness import Report, four_digits, run_alone, table_lines
from train.config.schema import RunConfig
from train.distributed.measure import peak_memory_mb, wait_for
from train.distributed.world import choose_device, cpu_share, open_world
from train.health.noise_scale import NoiseEstimate, smooth_noise
from train.runs.changes import rate_at
from train.setup import make_noise_parts, noise_batch
from train.step import train_step
from train.tune.steps import open_probe

log = logging.getLogger("train")

KNEE = 0.9
"""Share of the most images per second from which on hardware counts as busy."""
USABLE = 0.9
"""Share of the memory that a step may take; the rest is for the loader, and for evaluation."""
PARTS = 4
"""Number of parts of a batch, whose gradients are compared for the noise scale."""
WINDOWS = 6
"""Number of windows of steps, each with an estimate of its own."""


class BatchRow(msgspec.Struct, frozen=True, kw_only=True):
    """One batch size on one device: images per second, the median of the steps, and the peak of memory."""

    batch: int
    images_per_s: float
    step_ms: float
    memory_mb: float


class NoiseRow(msgspec.Struct, frozen=True, kw_only=True):
    """The noise scale over the steps of a window, up to `step`; None where noise hides the gradient."""

    step: int
    noise_scale: float | None
    loss: float


def bench_batches(
    config: RunConfig, *, smallest: int, largest: int, steps: int, noise_steps: int, ranks: int,
    limit_mb: float | None,
) -> Report:  # fmt: skip
    """Measure throughput and memory by batch size, and the gradient noise scale in training.

    Args:
        config: the run's; its own `global_batch` is that of the steps in which noise is measured.
        smallest, largest: sizes go from one to the other by doubling.
        steps: that are timed at each.
        noise_steps: of training, for the noise scale.
        ranks: how many the recommendation is for.
        limit_mb: memory that a step may take; None for 90% of what is there.
    Returns:
        `rows`, of the sizes that fit; `largest_estimate`, the largest that would fit, by the straight line
        through the two largest rows; `noise` in windows of training, and `noise_scale` of all of them
        together, the later ones weighing more; the recommended `global_batch`, and `why`.
    Raises:
        UserError: not even the smallest fits; or from the parts, as in a run.
    """
    if smallest > largest:
        raise UserError(f"--from must not be above --to, not {smallest} and {largest}")
    if config.model.norm_batch is not None:
        log.info("norm_batch is left out here: batch normalisation takes each batch, or part, as a whole")
        model = msgspec.structs.replace(config.model, norm_batch=None)
        config = msgspec.structs.replace(config, model=model)
    limit = limit_mb or USABLE * memory_limit_mb(choose_device(config.device))
    noise, scale, device, num_classes = measure_noise(config, noise_steps)
    sizes = [smallest * 2**n for n in range(32) if smallest * 2**n <= largest]
    rows, did_not_fit = measure_sizes(config, num_classes, sizes, steps, limit)
    if not rows:
        raise UserError(f"a batch of {did_not_fit}: try a smaller --from")
    knee, estimate = find_knee(rows), extrapolate(rows, limit)
    global_batch, why = advise_batch(knee, scale, min(estimate, 2**20), ranks)
    return {
        "recipe": config.recipe,
        "device": device,
        "rows": rows,
        "limit_mb": round(limit),
        "largest_fit": rows[-1].batch,
        "largest_estimate": estimate,
        "did_not_fit": did_not_fit,
        "knee": knee,
        "noise": noise,
        "noise_scale": None if scale is None else four_digits(scale),
        "ranks": ranks,
        "global_batch": global_batch,
        "why": why,
    }


def measure_sizes(
    config: RunConfig, num_classes: int, sizes: Sequence[int], steps: int, limit_mb: float
) -> tuple[list[BatchRow], str | None]:
    """Return a row for each size that fits, and the first size that does not, with the reason."""
    rows: list[BatchRow] = []
    with show_progress("batch sizes", len(sizes)) as progress:
        for size in sizes:
            if len(rows) >= 2 and size > (fits := extrapolate(rows, limit_mb)):
                return rows, f"{size}, since by its memory about {fits} fit"
            sized = msgspec.structs.replace(
                config, global_batch=size, micro_batch=None, log_noise_scale=False, compile=False
            )
            row: BatchRow | str = run_alone(measure_fit, sized, num_classes, steps)
            if isinstance(row, str):
                return rows, f"{size}: {row}"
            if row.memory_mb > limit_mb:
                return rows, f"{size}, which takes {row.memory_mb:.0f} MB of {limit_mb:.0f}"
            rows.append(row)
            progress.advance(1, f"{size}: {row.images_per_s:.0f} images/s, {row.memory_mb:.0f} MB")
    return rows, None


def measure_fit(config: RunConfig, num_classes: int, steps: int) -> BatchRow | str:
    """Train on a batch of noise, of the configuration's `global_batch`, in one pass.

    Args:
        steps: that are timed, after two that are not.
    Returns:
        The batch's row; or why it does not fit.
    """
    with open_world(config.device, config.timeout_s, deterministic=config.deterministic) as world:
        if world.device.type == "cpu":
            torch.set_num_threads(config.cpu_threads or cpu_share(1))
        try:
            parts = make_noise_parts(config, num_classes, world)
            batch = noise_batch(config.global_batch, config.preprocessing.crop_px, num_classes)
            step = partial(train_step, parts, [batch], 0.0, 0)
            seconds = repeat(step, timer=partial(wait_for, world.device), number=1, repeat=2 + steps)
            step_s = statistics.median(seconds[2:])
            return BatchRow(
                batch=config.global_batch, images_per_s=four_digits(config.global_batch / step_s),
                step_ms=four_digits(step_s * 1e3), memory_mb=round(peak_memory_mb(world.device)),
            )  # fmt: skip
        except (MemoryError, RuntimeError) as error:
            no_memory = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
            if not no_memory and "allocate memory" not in str(error):
                raise
            return str(error).partition("\n")[0] or "out of memory"


def memory_limit_mb(device: str) -> float:
    """Return the memory there is: a GPU's; on a CPU what is free, or left by the control group.

    Raises:
        UserError: this system does not say what is free.
    """
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / 1e6
    if (free := bytes_available()) is None:
        raise UserError("how much memory is free is not known here: say what a step may take with --limit-mb")
    return free / 1e6


def measure_noise(config: RunConfig, num_steps: int) -> tuple[list[NoiseRow], float | None, str, int]:
    """Measure the noise of the recipe's own first steps, each in parts.

    Returns:
        A row for each window, the scale of all together, the device's name, and how many classes there are.
    """
    parts = max(1, config.global_batch // PARTS)
    probed = msgspec.structs.replace(
        config, log_noise_scale=True, micro_batch=parts, compress="none", parallel="ddp"
    )
    rows: list[NoiseRow] = []
    sums: NoiseEstimate | None = None
    with open_probe(probed) as (run, step), show_progress("noise scale", num_steps) as progress:
        meter = run.parts.noise
        assert meter is not None
        window = max(1, num_steps // WINDOWS)
        losses: list[float] = []
        for number in range(1, num_steps + 1):
            losses.append(step(rate_at(run.step, config, run.progress, len(run.train_set))).loss)
            if number % window == 0 and (found := meter.read()) is not None:
                sums = smooth_noise(sums, found)
                loss = statistics.fmean(losses[-window:])
                scale = None if found.scale is None else four_digits(found.scale)
                rows.append(NoiseRow(step=number, noise_scale=scale, loss=four_digits(loss)))
            progress.advance(1, f"step {number}, loss {losses[-1]:.3f}")
        name, num_classes = run.parts.world.device_name, len(run.train_set.classes)
    return rows, None if sums is None else sums.scale, name, num_classes


def find_knee(rows: Sequence[BatchRow]) -> int:
    """Return the smallest batch at which the hardware is busy."""
    most = max(row.images_per_s for row in rows)
    return next(row.batch for row in rows if row.images_per_s >= KNEE * most)


def extrapolate(rows: Sequence[BatchRow], limit_mb: float) -> int:
    """Return the largest batch that would fit, by the straight line through the two largest sizes.

    >>> rows = [BatchRow(batch=b, images_per_s=1, step_ms=1, memory_mb=100 + 2 * b) for b in (8, 16)]
    >>> extrapolate(rows, 1100)
    500
    """
    if len(rows) < 2:
        return rows[-1].batch
    small, large = rows[-2:]
    slope = (large.memory_mb - small.memory_mb) / (large.batch - small.batch)
    if slope <= 0:  # what a batch takes is still lost in what the network does
        return 2**20
    return max(large.batch, int(large.batch + (limit_mb - large.memory_mb) / slope))


def advise_batch(knee: int, noise_scale: float | None, largest: int, ranks: int) -> tuple[int, str]:
    """Recommend a batch over all ranks, with the reason.

    >>> [advise_batch(32, *given)[0] for given in ((300, 999, 2), (300, 999, 64), (None, 16, 1))]
    [64, 256, 16]
    """
    busy = min(knee, largest) * ranks
    why = [f"{min(knee, largest)} images a rank keep it at {KNEE:.0%} of its speed or more"]
    if noise_scale is None:
        why.append("the noise scale could not be told from so few steps: more may be too many")
        return busy, "; ".join(why)
    useful = 1 << max(0, int(noise_scale).bit_length() - 1)
    if busy <= useful:
        why.append(
            f"the gradient's noise scale is about {noise_scale:.0f}, so {busy} a step waste little: about "
            f"{busy / noise_scale:.0%} more samples than the smallest batch would take"
        )
        if useful // min(knee, largest) > ranks:
            why.append(f"up to {useful // min(knee, largest)} such ranks would still shorten a run")
        return busy, "; ".join(why)
    why.append(
        f"the gradient's noise scale is about {noise_scale:.0f}: with the {busy} that would keep {ranks} "
        f"rank(s) busy, a run would take {1 + busy / noise_scale:.1f} times the fewest samples"
    )
    if useful >= ranks:
        why.append(f"so {useful}" + (", and fewer ranks would do as well" if ranks > 1 else ""))
    return max(useful, ranks), "; ".join(why)


def describe(report: Report) -> list[str]:
    """Return a table row for each size, the noise in windows, and the recommendation."""
    rows = [
        msgspec.structs.asdict(row) | {"": "the knee" if row.batch == report["knee"] else ""}
        for row in report["rows"]
    ]
    lines = [
        f"recipe {report['recipe']} on {report['device']}; a step may take {report['limit_mb']:.0f} MB",
        *table_lines(rows),
    ]
    if report["did_not_fit"] is not None:
        lines.append(f"does not fit: {report['did_not_fit']}")
    fit, estimate = report["largest_fit"], report["largest_estimate"]
    lines.append(f"largest that was measured and fits: {fit}; about {estimate} would")
    for row in report["noise"]:
        scale = "lost in the noise" if row.noise_scale is None else f"{row.noise_scale:.0f}"
        lines.append(f"noise scale up to step {row.step}: {scale} (loss {row.loss:.3f})")
    return [
        *lines,
        "the noise scale grows in training, often tenfold: measure it again in a run (log_noise_scale)",
        "recommended for {ranks} rank(s): global_batch = {global_batch}: {why}".format(**report),
    ]
