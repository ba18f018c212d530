"""`alexnet bench batch`: which `global_batch` a recipe should have on this machine, and why.

Two things decide. The hardware wants a batch large enough to be busy: from the knee on, where images per
second are at 90% of the most, larger ones only take longer. The gradient wants one not above its noise scale,
since beyond that more samples a step save few steps. Between the two a larger batch costs little, and lets
more ranks take part.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import UserError
from train.bench.turns import four_digits, open_subject
from train.config.schema import RunConfig
from train.distributed.world import choose_device
from train.health.noise_scale import NoiseEstimate, smooth_noise
from train.optim.schedule import base_lr_for, lr_at
from train.tune.batch_fit import Fit, memory_limit_mb
from train.tune.plots import COLORS, GREY, draw_panels, mark_line
from train.tune.steps import open_probe

KNEE = 0.9
"""Share of the most images per second from which on hardware counts as busy."""
USABLE = 0.9
"""Share of the memory that a step may take; the rest is for the loader, and for evaluation."""
PARTS = 4
"""Of a batch, whose gradients are compared for the noise scale."""
WINDOWS = 6
"""Of the steps, each with an estimate of its own."""


class BatchRow(msgspec.Struct, frozen=True, kw_only=True):
    """One batch size on one device: images per second (median of the steps) and the peak of memory."""

    batch: int
    images_per_s: float
    step_ms: float
    memory_mb: float


class NoiseRow(msgspec.Struct, frozen=True, kw_only=True):
    """The noise scale over the steps of a window, up to `step`; None where noise hides the gradient."""

    step: int
    noise_scale: float | None
    loss: float


class BatchReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `bench_batches` measured.

    Args:
        rows: by batch size, of those that fit.
        limit_mb: memory that a step may take here.
        largest_fit: the largest size that was measured and fits.
        largest_estimate: the largest that would fit, by the straight line through the two largest rows.
        did_not_fit: the smallest size that does not, and why; None where none was tried.
        knee: the smallest size at 90% of the most images per second.
        noise: in windows of training.
        noise_scale: of all of them together, the later ones weighing more; None where it cannot be told.
        ranks: how many the recommendation is for.
        global_batch: the recommendation.
        why: in sentences.
    """

    recipe: str
    device: str
    rows: list[BatchRow]
    limit_mb: float
    largest_fit: int
    largest_estimate: int
    did_not_fit: str | None
    knee: int
    noise: list[NoiseRow]
    noise_scale: float | None
    ranks: int
    global_batch: int
    why: str


def bench_batches(
    config: RunConfig,
    *,
    smallest: int = 8,
    largest: int = 512,
    steps: int = 5,
    noise_steps: int = 60,
    ranks: int = 1,
    limit_mb: float | None = None,
) -> BatchReport:
    """Measure throughput and memory by batch size, and the gradient noise scale in training.

    Args:
        config: the run's; its own `global_batch` is that of the steps in which noise is measured.
        smallest, largest: sizes go from one to the other by doubling.
        steps: that are timed at each.
        noise_steps: of training, for the noise scale.
        ranks: how many the recommendation is for.
        limit_mb: memory that a step may take; None for 90% of what is there.
    Raises:
        UserError: not even the smallest fits; or from the parts, as in a run.
    """
    if smallest > largest:
        raise UserError(f"--from must not be above --to, not {smallest} and {largest}")
    device = choose_device(config.device)
    limit = limit_mb or USABLE * memory_limit_mb(device)
    noise, scale, name, num_classes = _measure_noise(config, noise_steps)
    rows, did_not_fit = _measure_sizes(config, num_classes, smallest, largest, steps, limit)
    if not rows:
        raise UserError(f"a batch of {did_not_fit}: try a smaller --from")
    knee = find_knee(rows)
    estimate = extrapolate(rows, limit)
    global_batch, why = advise_batch(knee, scale, min(estimate, 2**20), ranks)
    return BatchReport(
        recipe=config.recipe,
        device=name,
        rows=rows,
        limit_mb=round(limit),
        largest_fit=rows[-1].batch,
        largest_estimate=estimate,
        did_not_fit=did_not_fit,
        knee=knee,
        noise=noise,
        noise_scale=None if scale is None else four_digits(scale),
        ranks=ranks,
        global_batch=global_batch,
        why=why,
    )


def _measure_sizes(
    config: RunConfig, num_classes: int, smallest: int, largest: int, steps: int, limit: float
) -> tuple[list[BatchRow], str | None]:
    sizes = [smallest * 2**n for n in range(32) if smallest * 2**n <= largest]
    rows: list[BatchRow] = []
    with show_progress("batch sizes", len(sizes)) as progress:
        for size in sizes:
            if len(rows) >= 2 and size > (fits := extrapolate(rows, limit)):
                return rows, f"{size}, since by its memory about {fits} fit"
            one = msgspec.structs.replace(
                config, global_batch=size, micro_batch=None, log_noise_scale=False, compile=False
            )
            with open_subject(
                "train.tune.batch_fit", [msgspec.json.encode(one).decode(), str(num_classes)]
            ) as ask:
                fit = msgspec.convert(ask(steps), Fit)
            if fit.step_s is None or fit.memory_mb is None:
                return rows, f"{size}: {fit.reason}"
            if fit.memory_mb > limit:
                return rows, f"{size}, which takes {fit.memory_mb:.0f} MB of {limit:.0f}"
            step_s = statistics.median(fit.step_s)
            rows.append(
                BatchRow(
                    batch=size,
                    images_per_s=four_digits(size / step_s),
                    step_ms=four_digits(step_s * 1e3),
                    memory_mb=round(fit.memory_mb),
                )
            )
            progress.advance(1, f"{size}: {size / step_s:.0f} images/s, {fit.memory_mb:.0f} MB")
    return rows, None


def _measure_noise(config: RunConfig, num_steps: int) -> tuple[list[NoiseRow], float | None, str, int]:
    """The recipe's own first steps, each in parts; the device, and how many classes there are."""
    parts = max(1, config.global_batch // PARTS)
    probed = msgspec.structs.replace(
        config, log_noise_scale=True, micro_batch=parts, compress="none", parallel="ddp"
    )
    rows: list[NoiseRow] = []
    sums: NoiseEstimate | None = None
    with open_probe(probed) as probe, show_progress("noise scale", num_steps) as progress:
        run_state = probe.run_state
        meter = run_state.parts.noise
        assert meter is not None
        window = max(1, num_steps // WINDOWS)
        losses: list[float] = []
        for number in range(1, num_steps + 1):
            rate = lr_at(
                run_state.step,
                config.schedule,
                steps_per_epoch=run_state.steps_per_epoch,
                total_steps=run_state.total_steps,
                base_lr=base_lr_for(config.schedule, config.global_batch),
            )
            losses.append(probe.step(rate).loss)
            if number % window == 0 and (found := meter.read()) is not None:
                sums = smooth_noise(sums, found)
                loss = statistics.fmean(losses[-window:])
                scale = None if found.scale is None else four_digits(found.scale)
                rows.append(NoiseRow(step=number, noise_scale=scale, loss=four_digits(loss)))
            progress.advance(1, f"step {number}, loss {losses[-1]:.3f}")
        name, num_classes = run_state.parts.world.device_name, len(run_state.train_set.classes)
    return rows, None if sums is None else sums.scale, name, num_classes


def find_knee(rows: Sequence[BatchRow]) -> int:
    """The smallest batch at which the hardware is busy."""
    most = max(row.images_per_s for row in rows)
    return next(row.batch for row in rows if row.images_per_s >= KNEE * most)


def extrapolate(rows: Sequence[BatchRow], limit_mb: float) -> int:
    """The largest batch that would fit, by the straight line through the two largest sizes.

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
    """The batch over all ranks, and why.

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


def describe(report: BatchReport) -> str:
    """The report for a person."""
    lines = [
        f"recipe {report.recipe} on {report.device}; a step may take {report.limit_mb:.0f} MB",
        f"{'batch':>6}{'images/s':>11}{'step ms':>10}{'MB':>8}",
    ]
    for row in report.rows:
        mark = "  the knee" if row.batch == report.knee else ""
        lines.append(
            f"{row.batch:>6}{row.images_per_s:>11.1f}{row.step_ms:>10.1f}{row.memory_mb:>8.0f}{mark}"
        )
    if report.did_not_fit is not None:
        lines.append(f"does not fit: {report.did_not_fit}")
    lines.append(
        f"largest that was measured and fits: {report.largest_fit}; about {report.largest_estimate} would"
    )
    for noise in report.noise:
        scale = "lost in the noise" if noise.noise_scale is None else f"{noise.noise_scale:.0f}"
        lines.append(f"noise scale up to step {noise.step}: {scale} (loss {noise.loss:.3f})")
    lines.append(
        "the noise scale grows in training, often tenfold: measure it again in a run (log_noise_scale)"
    )
    lines.append(
        f"recommended for {report.ranks} rank(s): global_batch = {report.global_batch}: {report.why}"
    )
    return "\n".join(lines)


def draw(report: BatchReport, path: Path) -> None:
    """Images per second and memory by batch, and the noise scale by step."""
    sizes = [row.batch for row in report.rows]
    with draw_panels(path, 3) as (speed, memory, noise):
        speed.plot(sizes, [row.images_per_s for row in report.rows], "o-", color=COLORS[0])
        mark_line(speed, report.knee, f"90% of the most: {report.knee}", COLORS[1], dashed=True)
        share = report.global_batch / report.ranks
        mark_line(speed, share, f"recommended: {share:g}", "black")
        speed.set(xscale="log", xlabel="batch of a rank", ylabel="images/s", ylim=(0, None))
        speed.set_title(f"{report.recipe}, speed")
        speed.legend(loc="lower right", fontsize=7.5)
        memory.plot(sizes, [row.memory_mb for row in report.rows], "o-", color=COLORS[0])
        memory.axhline(report.limit_mb, color=GREY, linestyle=":", label=f"limit: {report.limit_mb:.0f} MB")
        memory.set(xscale="log", yscale="log", xlabel="batch of a rank", ylabel="MB", title="peak of memory")
        memory.legend(loc="center left", fontsize=7.5)
        for panel in (speed, memory):
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.minorticks_off()
        known = [(row.step, row.noise_scale) for row in report.noise if row.noise_scale is not None]
        noise.plot([step for step, _ in known], [scale for _, scale in known], "o-", color=COLORS[2])
        noise.axhline(report.global_batch, color="black", label=f"recommended: {report.global_batch}")
        if report.noise_scale is not None:
            label = f"of all: {report.noise_scale:.0f}"
            noise.axhline(report.noise_scale, color=COLORS[2], linestyle="--", label=label)
        noise.set(xlabel="step", ylabel="samples", yscale="log", title="gradient noise scale")
        noise.legend(loc="best", fontsize=7.5)
