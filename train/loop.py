"""The loop over epochs: train, evaluate, log rows, save checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, nullcontext

import msgspec

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import InterruptedRunError, SaveError, UserError
from data_pipeline.loading.batches import Batch, group_by_step
from train.distributed.ddp import micro_batch_size
from train.distributed.hybrid import whole_network
from train.evaluate import EvaluationStoppedError, eval_micro_batch, evaluate, write_class_report
from train.graphs.choose import open_step
from train.health.metrics import ClassMeter, Metrics
from train.optim.schedule import plateau_drops
from train.runs.changes import rate_at
from train.runs.ending import LAST_EPOCH, why_over
from train.state import RunState, take_snapshot

log = logging.getLogger("train")


def run_epochs(run: RunState) -> Metrics | None:
    """Train to the last epoch, or until patience or time is over; evaluate and save after each epoch.

    Returns:
        The last validation metrics; None if the run was finished already.
    Raises:
        DivergedError: too many steps in a row were skipped, or the weights are not finite.
        InterruptedRunError: a signal asked to stop; the state is saved.
        SaveError: the last checkpoint could not be written.
    """
    metrics = None
    with ExitStack() as stack:
        steps = open_steps(run, stack, max(0, run.total_steps - run.step))
        run.ended = look_for_end(run, run.progress.seconds)
        if not run.evaluated and (run.ends_epoch or run.ended is not None):
            metrics = finish_epoch(run)
        elif run.ended is not None:
            log.info(f"nothing to do: this run is finished, at step {run.step}: {run.ended}")
        if run.ended is None:
            run.train_step, steps = open_step(run.parts, run.train_step, run.course, steps)
        while run.ended is None:
            train_epoch(run, steps)
            metrics = finish_epoch(run)
    finish_saving(run, "the end of the run is not saved")
    return metrics


def look_for_end(run: RunState, seconds: float) -> str | None:
    """Return why no step is to follow, see `why_over`; a collective where time is limited.

    `seconds` of training are by this rank's clock.
    """
    slowest = run.parts.world.max(seconds)[0] if run.config.max_hours else None
    return why_over(run.config, run.position / run.steps_per_epoch, run.progress.val_errors, slowest)


def open_steps(run: RunState, stack: ExitStack, num_steps: int | None) -> Iterator[list[Batch]]:
    """Start reading this rank's micro-batches, step by step from the current one; the stack stops it.

    Args:
        num_steps: how many; None for no end.
    """
    config, world = run.config, run.parts.world
    batches = run.loader.train(
        run.train_set,
        config.augment,
        seed=config.seed,
        global_batch=config.global_batch,
        balance=config.data.balance,
        rank=world.rank,
        world_size=world.world_size,
        micro_batch=micro_batch_size(config, world),
        start_step=run.position,
        num_steps=num_steps,
    )
    stack.enter_context(closing(batches))
    return group_by_step(batches)


def train_epoch(run: RunState, steps: Iterator[list[Batch]]) -> None:
    """Train from the current step to the end of its epoch, or of its time; log, save and poll when due."""
    config, world = run.config, run.parts.world
    epoch = run.position // run.steps_per_epoch + 1
    last_step = run.step + epoch * run.steps_per_epoch - run.position
    if run.row.num_steps == 0:
        run.row.reset()  # the row's time begins now, and not when the run was built
    title = f"epoch {epoch}/{config.epochs}"
    with show_progress(title, last_step - run.step, shown=world.is_main) as progress:
        while run.step < last_step and run.ended is None:
            lr = rate_at(run.step, config, run.progress, len(run.train_set))
            run.row.add(run.train_step(next(steps), lr, run.step))
            run.step += 1
            # The same on all ranks. After the epoch's last step, saving and polling wait for the evaluation.
            inside = run.step < last_step
            saves = inside and config.checkpoint_every is not None and run.step % config.checkpoint_every == 0
            # Each checkpoint has a row of its own step.
            has_row = not inside or saves or run.step % config.log_every == 0
            note = write_row(run, lr) if has_row else ""
            if saves:
                save(run, None)
            if inside and (has_row or run.interrupt.is_due(run.step)):
                stop_if_asked(run, saved=saves)
                run.ended = look_for_end(run, run.seconds)
                if run.ended is not None and not has_row:
                    note = write_row(run, lr)
            progress.advance(1, note)


def write_row(run: RunState, lr: float) -> str:
    """Reduce the counts since the last row, check and log them. Returns a note for the progress bar.

    Raises:
        DivergedError: from `train.runs.abort`.
    """
    parts, row = run.parts, run.row
    metrics = row.counts.reduce(parts.world)
    stats = parts.guard.read()
    run.abort.check_skipped_steps(stats, parts.scaler, step=run.step, seen=run.skipped)
    skipped, run.skipped = stats.total - run.skipped, stats.total
    images_per_s = (metrics.num_samples + metrics.num_failed) / row.seconds
    noise = parts.noise.read() if parts.noise is not None else None
    run.metrics_log.write(
        "train", run.step, metrics, noise, lr=lr, images_per_s=images_per_s, skipped=skipped
    )
    flat_loss = run.abort.check_flat_loss(run.progress.flat_loss, run.step, metrics)
    run.progress = msgspec.structs.replace(run.progress, flat_loss=flat_loss)
    row.reset()
    note = f"loss {metrics.loss:.4f}, top-1 {metrics.top1:.1%}, {images_per_s:.0f} images/s"
    return note + (f", {run.skipped} step(s) skipped" if run.skipped else "")


def finish_epoch(run: RunState) -> Metrics:
    """Evaluate and save after the last step of an epoch, or of the run; stop there if asked to and not over.

    Raises:
        InterruptedRunError: a signal asked to stop; a resumed run evaluates first, if this one could not.
    """
    config = run.config
    drops = plateau_drops(run.progress.val_errors, config.schedule)
    try:
        metrics = evaluate_epoch(run)
    except EvaluationStoppedError:
        stop_if_asked(run, saved=False)
        raise
    if run.parts.world.is_main:
        epoch = f"epoch {run.position // run.steps_per_epoch}/{config.epochs}"
        log.info(
            f"{epoch if run.ends_epoch else f'step {run.step}'}: validation loss {metrics.loss:.4f}, "
            f"top-1 {metrics.top1:.2%}, top-5 {metrics.top5:.2%} of {metrics.num_samples} images"
        )
        if run.ended not in (None, LAST_EPOCH):
            log.info(run.ended)
        elif plateau_drops(run.progress.val_errors, config.schedule) > drops:
            log.info(
                f"no better top-1 for {config.schedule.patience} epoch(s): the learning rate is "
                f"multiplied by {config.schedule.factor:g} (drop {drops + 1} of {config.schedule.max_drops})"
            )
    save(run, metrics)
    if run.ended is None:
        stop_if_asked(run, saved=True)
    return metrics


def evaluate_epoch(run: RunState) -> Metrics:
    """Evaluate on the whole validation split, see whether the run is over, and log a row.

    With `ema_decay` it is the weights' average that is evaluated.

    Raises:
        EvaluationStoppedError: a signal has asked a rank to stop.
        UserError: no validation image could be read.
    """
    config, parts, started = run.config, run.parts, time.monotonic()
    weights = nullcontext() if parts.ema is None else parts.ema.swapped_in(parts.network)
    batches = run.loader.eval(
        run.val_set,
        micro_batch=eval_micro_batch(config.ten_crop),
        rank=parts.world.rank,
        world_size=parts.world.world_size,
        ten_crop=config.ten_crop,
    )
    # Reported once, at the end of the run, which with patience or a time limit is known only afterwards.
    may_end = run.step >= run.total_steps or config.stop_patience or config.max_hours
    classes = ClassMeter(parts.world.device, len(run.val_set.classes)) if may_end else None
    with weights, closing(batches):
        metrics = evaluate(
            whole_network(parts.parallel),
            parts.normalize,
            batches,
            parts.precision,
            parts.world,
            num_samples=len(run.val_set),
            stop=lambda: run.interrupt.check_flag(parts.world),
            classes=classes,
        )
    if metrics.num_samples == 0:
        raise UserError(f"none of the {metrics.num_failed} validation images could be read")
    images_per_s = len(run.val_set) / (time.monotonic() - started)
    if run.ends_epoch:
        errors = (*run.progress.val_errors, 1 - metrics.top1)
        run.progress = msgspec.structs.replace(run.progress, val_errors=errors)
    run.ended = run.ended or look_for_end(run, run.seconds)
    fields = {"lr": parts.optimizer.param_groups[0]["lr"], "images_per_s": images_per_s}
    if classes is not None and run.ended is not None:
        folder = run.folder.path if run.folder is not None else None
        fields["report"] = write_class_report(classes, parts.world, run.val_set, folder)
    run.metrics_log.write("val", run.step, metrics, **fields)
    return metrics


def stop_if_asked(run: RunState, *, saved: bool) -> None:
    """Stop all ranks, with the state saved, if any of them received a signal. Waits for the device.

    Args:
        saved: whether this step is saved already.
    Raises:
        InterruptedRunError: a rank received a signal.
        SaveError: it did, and the state could not be saved.
    """
    if not run.interrupt.poll(run.parts.world, run.step):
        return
    if not saved:
        save(run, None)
    finish_saving(run, "asked to stop, and not saved")
    received = run.interrupt.received or "another rank's signal"
    raise InterruptedRunError(f"stopped by {received} at step {run.step}, saved; go on with --resume auto")


def save(run: RunState, metrics: Metrics | None) -> None:
    """Copy the state and write it in the background; at most one checkpoint is being written.

    A checkpoint that cannot be written does not end the run, since later ones may be; only if it was the
    last one, the run ends with an error.

    Args:
        metrics: of the validation split at this step; None where it was not evaluated.
    Raises:
        DivergedError: the weights are not finite; nothing is written, and nothing removed.
    """
    started = time.monotonic()
    run.abort.check_weights(run.parts.network, run.parts.optimizer, run.parts.world, run.step)
    if run.writer is not None:
        run.writer.wait(f"step {run.step}")
    snapshot = take_snapshot(run, metrics)
    if run.writer is not None and snapshot is not None:
        run.writer.start(snapshot)
    run.held_up_s += time.monotonic() - started


def finish_saving(run: RunState, otherwise: str) -> None:
    """Wait, on all ranks, for the checkpoint in flight.

    Raises:
        SaveError: the last one could not be written; `otherwise` begins the message.
    """
    failure = run.parts.world.broadcast_object(lambda: run.writer.wait() if run.writer is not None else None)
    if failure is not None:
        raise SaveError(f"{otherwise}: {failure}")
