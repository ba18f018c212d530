"""Metrics since the last training row; a checkpoint keeps them, since a run may stop between two rows."""

from __future__ import annotations

import time
from typing import Any

from train.distributed.world import World
from train.health.metrics import AccuracyMeter
from train.health.noise_scale import NoiseMeter


class RunningMetrics:
    """This rank's counts for the training row that is due next.

    Args:
        world: the ranks over which the row is reduced in the end.
        noise: counts along, with `log_noise_scale`.
    """

    def __init__(self, world: World, noise: NoiseMeter | None) -> None:
        self.world, self.noise = world, noise
        self.reset()

    def reset(self) -> None:
        """Start a row, without any step in it."""
        self.counts, self.num_steps = AccuracyMeter(self.world.device), 0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time since the row was started, without the time between a stop and a resume."""
        return time.monotonic() - self._started

    def add(self, counts: AccuracyMeter) -> None:
        """Add one step."""
        self.counts.merge(counts)
        self.num_steps += 1

    def state_dict(self, skipped: int) -> dict[str, Any]:
        """Return the counts of all ranks, side by side; empty right after a row. Every rank must call this.

        Args:
            skipped: steps that the guard had skipped when the row was started.
        """
        if self.num_steps == 0:
            return {}
        return {
            "integers": self.world.all_gather(self.counts.integers),
            "loss_sums": self.world.all_gather(self.counts.loss_sum),
            "noise": None if self.noise is None else self.world.all_gather(self.noise.pending()),
            "num_steps": self.num_steps,
            "skipped": skipped,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume counting: to the bit with as many ranks as before, else with all their counts on rank 0."""
        if not state:
            return
        self.counts.integers.copy_(self.world.own_share(state["integers"]))
        self.counts.loss_sum.copy_(self.world.own_share(state["loss_sums"]))
        if self.noise is not None and state["noise"] is not None:
            self.noise.load(state["noise"])
        self.num_steps = int(state["num_steps"])
        self._started -= float(state["seconds"])
