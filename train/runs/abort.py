"""Abort policy: log skipped steps; stop the run after too many of them, or when the loss does not move."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from data_pipeline.common.errors import DivergedError
from data_pipeline.common.files import write_json
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.transforms.sampler import order_at, positions_at
from train.checkpoints.background import AsyncCheckpointWriter
from train.checkpoints.retention import saved_steps
from train.config.schema import RunConfig
from train.distributed.world import World
from train.health.flat_loss import FlatLoss, describe_flat, guess_loss
from train.health.metrics import Metrics
from train.health.nonfinite import MIN_SCALE, SkipStats, all_finite
from train.runs.folder import RunFolder

log = logging.getLogger("train")

NUM_SHOWN = 3
"""Most paths that a message names; the file has all."""


@dataclass(frozen=True)
class AbortPolicy:
    """Ends a run that only wastes time, with what was seen and what to change.

    Every rank calls every method with the same numbers, so that all ranks stop at the same step.

    Attributes:
        train_set: whose files are named as evidence.
        folder: the run's; None on the ranks other than 0, which neither log nor write.
        writer: of its checkpoints; None like `folder`.
        step_offset: see `train.checkpoints.format.Progress`.
    """

    config: RunConfig
    train_set: Dataset
    folder: RunFolder | None
    writer: AsyncCheckpointWriter | None
    step_offset: int = 0

    def check_skipped_steps(
        self, stats: SkipStats, scaler: torch.amp.GradScaler, *, step: int, seen: int
    ) -> None:
        """Log the steps that were skipped since the last check.

        Args:
            step: optimiser steps finished.
            seen: total of skipped steps at the last check.
        Raises:
            DivergedError: `max_skipped` in a row, or float16's loss scale is too small to be used.
        """
        limit = self.config.max_skipped
        if stats.total > seen and self.folder is not None:
            log.warning(
                f"{stats.total - seen} step(s) up to step {step} skipped on all ranks, {stats.in_row} in a "
                f"row now ({limit} end the run): the gradient was not finite, or a spike; {stats.total} "
                f"since the run began, {stats.spikes} of them spikes"
            )
        if stats.in_row >= limit:
            raise DivergedError(
                f"{limit} steps in a row, from step {stats.first + 1} on, had a gradient that is not finite"
                f"{'' if self.config.spike_factor is None else ' or a spike'}; the weights are those of "
                f"step {stats.first}. {self._write_samples(stats.first, limit)}{self._last_good()}"
                "Start anew with a lower schedule.learning_rate or a longer schedule.warmup_epochs"
            )
        if scaler.is_enabled() and (scale := scaler.get_scale()) < MIN_SCALE:
            raise DivergedError(
                f"float16's loss scale fell to {scale:g} by step {step}: gradients overflow without "
                f"any scaling. {self._last_good()}Use precision=bf16 or fp32, or a lower "
                "schedule.learning_rate"
            )

    def check_flat_loss(self, flat: FlatLoss, step: int, metrics: Metrics) -> FlatLoss:
        """Follow the training loss.

        Args:
            flat: the state at the last row.
            step: optimiser steps finished.
            metrics: of the samples since the last row, over all ranks.
        Returns:
            The state at this row.
        Raises:
            DivergedError: the loss has stayed at ln(classes) for `flat_loss_grace` steps.
        """
        config = self.config
        if config.flat_loss_grace == 0:
            return flat
        flat = flat.after(step, metrics, self._guess_loss, config.flat_loss_grace)
        if flat.num_steps >= config.flat_loss_grace:
            reason = describe_flat(self._guess_loss, len(self.train_set.classes), flat.num_steps, config)
            raise DivergedError(f"{reason}. {self._last_good()}".rstrip(". "))
        return flat

    @cached_property
    def _guess_loss(self) -> float:
        return guess_loss(self.config, self.train_set)

    def check_weights(
        self, network: nn.Module, optimizer: torch.optim.Optimizer, world: World, step: int
    ) -> None:
        """Refuse to save weights that are not finite; they would push a good checkpoint out.

        Raises:
            DivergedError: a weight or a momentum is NaN or infinite on any rank; all raise it.
        """
        momenta = [value for state in optimizer.state.values() for value in state.values()]
        tensors = [*network.state_dict().values(), *(m for m in momenta if isinstance(m, torch.Tensor))]
        if world.any(not all_finite(tensors)):
            raise DivergedError(
                f"the weights or their momentum are not finite at step {step}, which is not saved. "
                f"{self._last_good()}Start anew with a lower schedule.learning_rate"
            )

    def _write_samples(self, first: int, num_steps: int) -> str:
        """Write the samples of some steps to `diverged.json`, on rank 0. Returns a sentence that names it."""
        if self.folder is None:
            return ""
        steps = [{"step": s + 1, "samples": self._samples_at(s)} for s in range(first, first + num_steps)]
        path = self.folder.path / "diverged.json"
        shown = ", ".join(self._samples_at(first)[:NUM_SHOWN])
        try:
            write_json(path, steps)
        except OSError as error:
            return f"Their samples begin with {shown}; {path} could not be written: {error.strerror}. "
        return f"Their samples, {shown} and so on, are in {path}. "

    def _samples_at(self, step: int) -> list[str]:
        """Return the paths of a step's samples over all ranks, a function of the seed and the step alone."""
        size = len(self.train_set)
        epoch, positions = positions_at(step - self.step_offset, size, self.config.global_batch, 0, 1)
        order = order_at(self.config.seed, epoch, self.train_set.labels, self.config.data.balance)
        indices = order[positions]
        return [printable(self.train_set.path_at(int(index))) for index in indices]

    def _last_good(self) -> str:
        """Return a sentence that names the newest checkpoint."""
        if self.writer is None:
            return ""
        self.writer.wait()
        saved = list(saved_steps(self.writer.folder).values())
        return f"The last good checkpoint is {saved[-1]}. " if saved else "There is no checkpoint yet. "
