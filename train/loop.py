"""The loop over epochs: train, evaluate, write rows, save."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from typing import Protocol

import msgspec
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.console import show_progress
from data_pipeline.errors import InterruptedRunError, SaveError, UserError
from data_pipeline.loader import Batch, eval_batches, train_batches
from train.divergence import check_weights, heed_flat_loss, heed_guard
from train.engine import EVAL_BATCH, evaluate, train_step
from train.metrics import Counts, Metrics
from train.noise_rows import NoiseRows
from train.noise_scale import NoiseEstimate
from train.run_folder import Row
from train.schedule import base_rate_for, lr_at, plateau_drops
from train.session import Session
from train.snapshot import snapshot

log = logging.getLogger("train")


class Recorder(Protocol):
    """Where rows go."""

    def __call__(
        self,
        split: str,
        metrics: Metrics,
        lr: float,
        images_per_s: float,
        skipped: int = 0,
        noise: NoiseEstimate | None = None,
    ) -> None:
        """Write one row for the session's present step."""


def run_epochs(session: Session) -> Metrics | None:
    """Train to the last epoch; at the end of each, evaluate and save a checkpoint.

    Returns:
        Validation metrics of the last epoch; None where the run was finished already.
    Raises:
        DivergedError: too many steps in a row were skipped, or the weights are not finite.
        InterruptedRunError: a signal asked to stop; the state is saved.
    """
    config, world = session.config, session.trainer.world
    metrics = None
    with ExitStack() as stack:
        record = _open_records(session, stack)
        batches = train_batches(
            session.train_set,
            session.backend,
            config.preprocessing,
            config.augment,
            seed=config.seed,
            global_batch=config.global_batch,
            rank=world.rank,
            world_size=world.world_size,
            micro_batch=session.micro_batch,
            start_step=session.step,
            num_steps=session.total_steps - session.step,
            prefetch=config.data.prefetch,
            faults=session.faults,
            readers=session.readers,
        )
        stack.enter_context(closing(batches))
        steps = by_step(batches)
        if session.step >= session.total_steps:
            log.info(f"nothing to do: this run is finished, at step {session.step}")
        for epoch in range(session.step // session.steps_per_epoch, config.epochs):
            train_epoch(session, epoch, steps, record)
            metrics = evaluate_epoch(session, record)
            drops = count_drops(session)
            errors = (*session.progress.val_errors, 1 - metrics.top1)
            session.progress = msgspec.structs.replace(session.progress, val_errors=errors)
            if world.is_main:
                log.info(
                    f"epoch {epoch + 1}/{config.epochs}: validation loss {metrics.loss:.4f}, "
                    f"top-1 {metrics.top1:.2%}, top-5 {metrics.top5:.2%} of {metrics.num_samples} images"
                )
                if count_drops(session) > drops:
                    log.info(
                        f"no better top-1 for {config.schedule.patience} epoch(s): the learning rate is "
                        f"multiplied by {config.schedule.factor:g} (drop {drops + 1} of "
                        f"{config.schedule.max_drops})"
                    )
            save(session, metrics)
            stop_if_asked(session)
    finish_saving(session)
    return metrics


def by_step(batches: Iterator[Batch]) -> Iterator[list[Batch]]:
    """Gather the micro-batches of each step."""
    gathered: list[Batch] = []
    for batch in batches:
        gathered.append(batch)
        if batch.last:
            yield gathered
            gathered = []


def train_epoch(session: Session, epoch: int, steps: Iterator[list[Batch]], record: Recorder) -> None:
    """The steps of one epoch from where the session stands; a training row every `log_every` steps."""
    config, world = session.config, session.trainer.world
    end = (epoch + 1) * session.steps_per_epoch
    counts, started = Counts(world.device), time.monotonic()
    base_rate, drops = base_rate_for(config.schedule, config.global_batch), count_drops(session)
    title = f"epoch {epoch + 1}/{config.epochs}"
    with show_progress(title, end - session.step, shown=world.is_main) as progress:
        while session.step < end:
            learning_rate = lr_at(
                session.step,
                config.schedule,
                steps_per_epoch=session.steps_per_epoch,
                total_steps=session.total_steps,
                base_rate=base_rate,
                drops=drops,
            )
            counts.merge(train_step(session.trainer, next(steps), learning_rate, session.step))
            session.step += 1
            note, due = "", session.step < end and is_due(session.step, config.checkpoint_every)
            if due or is_due(session.step, config.log_every) or session.step == end:
                metrics = counts.reduce(world)
                skipped = heed_guard(session)
                seconds = time.monotonic() - started
                images_per_s = (metrics.num_samples + metrics.num_failed) / seconds
                noise = session.trainer.noise.read() if session.trainer.noise is not None else None
                record("train", metrics, learning_rate, images_per_s, skipped, noise)
                heed_flat_loss(session, metrics)
                note = f"loss {metrics.loss:.4f}, top-1 {metrics.top1:.1%}, {images_per_s:.0f} images/s"
                note += f", {session.skipped} step(s) skipped" if session.skipped else ""
                if due:
                    save(session, None)
                if session.step < end:  # at the end of the epoch, after it is evaluated and saved
                    stop_if_asked(session, saved=due)
                counts, started = Counts(world.device), time.monotonic()
            progress.advance(1, note)


def count_drops(session: Session) -> int:
    """How often the plateau schedule has lowered the rate by now; the same on all ranks."""
    return plateau_drops(session.progress.val_errors, session.config.schedule)


def is_due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens after this one."""
    return every is not None and step % every == 0


def stop_if_asked(session: Session, *, saved: bool = True) -> None:
    """Stop all ranks, with the state saved, if a signal has reached any of them.

    Called where a row has just been written, so that no count is under way, and the device was waited for.

    Args:
        saved: whether this step is saved already.
    Raises:
        InterruptedRunError: a rank was asked to stop.
        SaveError: it was, and the state could not be saved.
    """
    if not session.trainer.world.any(bool(session.interrupt)):
        return
    if not saved:
        save(session, None)
    finish_saving(session)
    if session.unsaved is not None:
        raise SaveError(f"asked to stop, and not saved: {session.unsaved}")
    asked = session.interrupt.received or "another rank's signal"
    raise InterruptedRunError(f"stopped by {asked} at step {session.step}, saved; go on with --resume auto")


def evaluate_epoch(session: Session, record: Recorder) -> Metrics:
    """Metrics of the whole validation split, and their row: of the average of the weights, if one is kept."""
    config, trainer, started = session.config, session.trainer, time.monotonic()
    trainer.world.average_buffers(trainer.network)
    weights: AbstractContextManager[None] = nullcontext()
    if trainer.average is not None:
        # The weights are the same on all ranks; of running statistics, rank 0's are those that are saved.
        trainer.world.share_from_main(trainer.average.statistics(trainer.network))
        weights = trainer.average.in_place(trainer.network)
    batches = eval_batches(
        session.val_set,
        session.backend,
        config.preprocessing,
        micro_batch=EVAL_BATCH // 10 if config.ten_crop else EVAL_BATCH,
        rank=trainer.world.rank,
        world_size=trainer.world.world_size,
        prefetch=config.data.prefetch,
        faults=session.faults,
        ten_crop=config.ten_crop,
        readers=session.readers,
    )
    with weights:
        metrics = evaluate(
            trainer.network,
            trainer.normalize,
            batches,
            trainer.precision,
            trainer.world,
            num_samples=len(session.val_set),
        )
    if metrics.num_samples == 0:
        raise UserError(f"none of the {metrics.num_failed} validation images could be read")
    images_per_s = len(session.val_set) / (time.monotonic() - started)
    record("val", metrics, trainer.optimizer.param_groups[0]["lr"], images_per_s)
    return metrics


def save(session: Session, metrics: Metrics | None) -> None:
    """Copy the state, and write it while training goes on; at most one checkpoint is being written.

    A checkpoint that cannot be written does not end the run, since later ones may be; if the last one was
    not, the run's end says so.

    Args:
        metrics: of the validation split at this step; None inside an epoch.
    Raises:
        DivergedError: the weights are not finite; nothing is written, and nothing removed.
    """
    started = time.monotonic()
    check_weights(session)
    if session.saver is not None:
        session.saver.wait(f"step {session.step}")
    state = snapshot(session, metrics)
    if session.saver is not None and state is not None:
        session.saver.start(state)
    session.held_up_s += time.monotonic() - started


def finish_saving(session: Session) -> None:
    """Wait, on all ranks, for the checkpoint in flight; all then know from `unsaved` what became of it."""

    def on_main() -> str | None:
        assert session.saver is not None
        session.saver.wait()
        return session.saver.unsaved

    session.unsaved = session.trainer.world.from_main(on_main)


def _open_records(session: Session, stack: ExitStack) -> Recorder:
    """Rows to `metrics.jsonl` and TensorBoard on rank 0; nowhere on the others."""
    folder = session.folder
    if folder is None:
        return lambda split, metrics, lr, images_per_s, skipped=0, noise=None: None
    board = SummaryWriter(str(folder.path / "tensorboard"), purge_step=session.step + 1)
    stack.callback(board.close)
    noise_rows = NoiseRows(folder.rows()) if session.config.log_noise_scale else None

    def record(
        split: str,
        metrics: Metrics,
        lr: float,
        images_per_s: float,
        skipped: int = 0,
        noise: NoiseEstimate | None = None,
    ) -> None:
        row = Row(
            split=split,
            epoch=-(-session.step // session.steps_per_epoch),
            step=session.step,
            samples=metrics.num_samples,
            failed=metrics.num_failed,
            skipped=skipped,
            loss=_finite(metrics.loss),
            top1=_finite(metrics.top1),
            top5=_finite(metrics.top5),
            lr=lr,
            images_per_s=images_per_s,
            time=time.time(),
            **(noise_rows.fields(noise) if noise_rows is not None and split == "train" else {}),
        )
        folder.append(row)
        for name, value in msgspec.structs.asdict(row).items():
            if name not in ("split", "epoch", "step", "time") and isinstance(value, int | float):
                board.add_scalar(f"{split}/{name}", value, session.step)

    return record


def _finite(value: float) -> float | None:
    """JSON has no NaN: null stands for it."""
    return value if math.isfinite(value) else None
