"""The loop over epochs: train, evaluate, write rows, save."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext

import msgspec

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import InterruptedRunError, SaveError, UserError
from data_pipeline.loading.prefetch import Batch
from train.distributed.hybrid import whole_network
from train.health.metrics import Metrics
from train.optim.schedule import base_rate_for, lr_at, plateau_drops
from train.runs.abort import check_flat_loss, check_skipped_steps, check_weights
from train.runs.metrics_log import Recorder, make_recorder
from train.setup import RunState
from train.state import snapshot
from train.step import BrokenOffError, eval_micro_batch, evaluate, train_step

log = logging.getLogger("train")


def run_epochs(run_state: RunState) -> Metrics | None:
    """Train to the last epoch; at the end of each, evaluate and save a checkpoint.

    Returns:
        Validation metrics of the last epoch; None where the run was finished already.
    Raises:
        DivergedError: too many steps in a row were skipped, or the weights are not finite.
        InterruptedRunError: a signal asked to stop; the state is saved.
    """
    metrics = None
    with ExitStack() as stack:
        record = make_recorder(run_state)
        steps = open_steps(run_state, stack, run_state.total_steps - run_state.step)
        if run_state.unevaluated:
            metrics = finish_epoch(run_state, record)
        elif run_state.step >= run_state.total_steps:
            log.info(f"nothing to do: this run is finished, at step {run_state.step}")
        while run_state.step < run_state.total_steps:
            train_epoch(run_state, run_state.step // run_state.steps_per_epoch, steps, record)
            metrics = finish_epoch(run_state, record)
    finish_saving(run_state)
    return metrics


def finish_epoch(run_state: RunState, record: Recorder) -> Metrics:
    """Evaluate and save after the last step of an epoch, and stop there if asked to and more is to come.

    Raises:
        InterruptedRunError: a signal asked to stop; a resumed run evaluates first, if this one could not.
    """
    config, epoch = run_state.config, run_state.step // run_state.steps_per_epoch
    try:
        metrics = evaluate_epoch(run_state, record)
    except BrokenOffError:
        stop_if_asked(run_state, saved=False)
        raise
    drops = count_drops(run_state)
    errors = (*run_state.progress.val_errors, 1 - metrics.top1)
    run_state.progress = msgspec.structs.replace(run_state.progress, val_errors=errors)
    if run_state.trainer.world.is_main:
        log.info(
            f"epoch {epoch}/{config.epochs}: validation loss {metrics.loss:.4f}, "
            f"top-1 {metrics.top1:.2%}, top-5 {metrics.top5:.2%} of {metrics.num_samples} images"
        )
        if count_drops(run_state) > drops:
            log.info(
                f"no better top-1 for {config.schedule.patience} epoch(s): the learning rate is "
                f"multiplied by {config.schedule.factor:g} (drop {drops + 1} of {config.schedule.max_drops})"
            )
    save(run_state, metrics)
    if run_state.step < run_state.total_steps:
        stop_if_asked(run_state)
    return metrics


def open_steps(run_state: RunState, stack: ExitStack, num_steps: int | None) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each step from the present step; the stack ends the reading ahead.

    Args:
        num_steps: how many; None for no end.
    """
    config, world = run_state.config, run_state.trainer.world
    batches = run_state.loader.train(
        run_state.train_set,
        config.augment,
        seed=config.seed,
        global_batch=config.global_batch,
        rank=world.rank,
        world_size=world.world_size,
        micro_batch=run_state.micro_batch,
        start_step=run_state.step,
        num_steps=num_steps,
    )
    stack.enter_context(closing(batches))
    return by_step(batches)


def by_step(batches: Iterator[Batch]) -> Iterator[list[Batch]]:
    """Gather the micro-batches of each step."""
    gathered: list[Batch] = []
    for batch in batches:
        gathered.append(batch)
        if batch.last:
            yield gathered
            gathered = []


def train_epoch(run_state: RunState, epoch: int, steps: Iterator[list[Batch]], record: Recorder) -> None:
    """The steps of one epoch from the present step; a training row every `log_every` steps."""
    config, world, row = run_state.config, run_state.trainer.world, run_state.row
    end = (epoch + 1) * run_state.steps_per_epoch
    if row.num_steps == 0:
        row.begin()
    base_rate, drops = base_rate_for(config.schedule, config.global_batch), count_drops(run_state)
    title = f"epoch {epoch + 1}/{config.epochs}"
    with show_progress(title, end - run_state.step, shown=world.is_main) as progress:
        while run_state.step < end:
            learning_rate = lr_at(
                run_state.step,
                config.schedule,
                steps_per_epoch=run_state.steps_per_epoch,
                total_steps=run_state.total_steps,
                base_rate=base_rate,
                drops=drops,
            )
            row.add(train_step(run_state.trainer, next(steps), learning_rate, run_state.step))
            run_state.step += 1
            note, due = "", run_state.step < end and is_due(run_state.step, config.checkpoint_every)
            row_due = due or is_due(run_state.step, config.log_every) or run_state.step == end
            if row_due:
                metrics = row.counts.reduce(world)
                skipped = check_skipped_steps(run_state)
                images_per_s = (metrics.num_samples + metrics.num_failed) / row.seconds
                noise = run_state.trainer.noise.read() if run_state.trainer.noise is not None else None
                record("train", metrics, learning_rate, images_per_s, skipped, noise)
                check_flat_loss(run_state, metrics)
                note = f"loss {metrics.loss:.4f}, top-1 {metrics.top1:.1%}, {images_per_s:.0f} images/s"
                note += f", {run_state.skipped} step(s) skipped" if run_state.skipped else ""
                row.begin()
            if due:
                save(run_state, None)
            # At the end of the epoch the question comes after it is evaluated and saved, or between.
            if run_state.step < end and (row_due or run_state.interrupt.is_due(run_state.step)):
                stop_if_asked(run_state, saved=due)
            progress.advance(1, note)
    world.average_buffers(run_state.trainer.network)


def count_drops(run_state: RunState) -> int:
    """How often the plateau schedule has lowered the rate by now; the same on all ranks."""
    return plateau_drops(run_state.progress.val_errors, run_state.config.schedule)


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0


def stop_if_asked(run_state: RunState, *, saved: bool = True) -> None:
    """Stop all ranks, with the state saved, if a signal has reached any of them. Waits for the device.

    Args:
        saved: whether this step is saved already.
    Raises:
        InterruptedRunError: a rank was asked to stop.
        SaveError: it was, and the state could not be saved.
    """
    if not run_state.interrupt.ask(run_state.trainer.world, run_state.step):
        return
    if not saved:
        save(run_state, None)
    finish_saving(run_state)
    if run_state.unsaved is not None:
        raise SaveError(f"asked to stop, and not saved: {run_state.unsaved}")
    asked = run_state.interrupt.received or "another rank's signal"
    raise InterruptedRunError(f"stopped by {asked} at step {run_state.step}, saved; go on with --resume auto")


def evaluate_epoch(run_state: RunState, record: Recorder) -> Metrics:
    """Metrics of the whole validation split, and their row: of the average of the weights, if one is kept.

    Raises:
        BrokenOffError: a signal has asked a rank to stop.
    """
    config, trainer, started = run_state.config, run_state.trainer, time.monotonic()
    weights: AbstractContextManager[None] = nullcontext()
    if trainer.average is not None:
        # The weights are the same on all ranks; of running statistics, rank 0's are those that are saved.
        trainer.world.broadcast(trainer.average.statistics(trainer.network))
        weights = trainer.average.in_place(trainer.network)
    batches = run_state.loader.eval(
        run_state.val_set,
        micro_batch=eval_micro_batch(config.ten_crop),
        rank=trainer.world.rank,
        world_size=trainer.world.world_size,
        ten_crop=config.ten_crop,
    )
    with weights, closing(batches):
        metrics = evaluate(
            whole_network(trainer.parallel),
            trainer.normalize,
            batches,
            trainer.precision,
            trainer.world,
            num_samples=len(run_state.val_set),
            stop=lambda: run_state.interrupt.heard(trainer.world),
        )
    if metrics.num_samples == 0:
        raise UserError(f"none of the {metrics.num_failed} validation images could be read")
    images_per_s = len(run_state.val_set) / (time.monotonic() - started)
    record("val", metrics, trainer.optimizer.param_groups[0]["lr"], images_per_s)
    return metrics


def save(run_state: RunState, metrics: Metrics | None) -> None:
    """Copy the state, and write it while training goes on; at most one checkpoint is being written.

    A checkpoint that cannot be written does not end the run, since later ones may be; if the last one was
    not, the run's end says so.

    Args:
        metrics: of the validation split at this step; None inside an epoch.
    Raises:
        DivergedError: the weights are not finite; nothing is written, and nothing removed.
    """
    started = time.monotonic()
    check_weights(run_state)
    if run_state.saver is not None:
        run_state.saver.wait(f"step {run_state.step}")
    state = snapshot(run_state, metrics)
    if run_state.saver is not None and state is not None:
        run_state.saver.start(state)
    run_state.held_up_s += time.monotonic() - started


def finish_saving(run_state: RunState) -> None:
    """Wait, on all ranks, for the checkpoint in flight; all then know from `unsaved` what became of it."""

    def on_main() -> str | None:
        assert run_state.saver is not None
        run_state.saver.wait()
        return run_state.saver.unsaved

    run_state.unsaved = run_state.trainer.world.broadcast_object(on_main)
