"""What was counted since the last training row: a run may stop before the next one is due."""

from __future__ import annotations

import time
from typing import Any

from train.distributed.world import World
from train.health.metrics import AccuracyMeter
from train.health.noise_scale import NoiseMeter

# Shapes: R ranks.


class RunningMetrics:
    """The row that is being counted on this rank.

    Args:
        world: the ranks that it is summed over in the end.
        noise: counts with it, where somebody asks.
    """

    def __init__(self, world: World, noise: NoiseMeter | None) -> None:
        self.world, self.noise = world, noise
        self.begin()

    def begin(self) -> None:
        """Count from nothing."""
        self.counts, self.num_steps = AccuracyMeter(self.world.device), 0
        self._started = time.monotonic()

    @property
    def seconds(self) -> float:
        """For how long it has been counted, without the time between a stop and a resume."""
        return time.monotonic() - self._started

    def add(self, counts: AccuracyMeter) -> None:
        """Count one step."""
        self.counts.merge(counts)
        self.num_steps += 1

    def state_dict(self, skipped: int) -> dict[str, Any]:
        """What all ranks have counted, each for itself; nothing right behind a row. Every rank calls this.

        Args:
            skipped: steps that the guard had skipped when the row began.
        """
        if self.num_steps == 0:
            return {}
        return {
            "integers": self.world.all_gather(self.counts.integers),
            "loss_sums": self.world.all_gather(self.counts.loss_sum),
            "noise": None if self.noise is None else self.world.all_gather(self.noise.unread()),
            "num_steps": self.num_steps,
            "skipped": skipped,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting: to the bit with as many ranks as before, else with all that they had on rank 0."""
        if not state:
            return
        integers_R4, losses_R = state["integers"], state["loss_sums"]
        if len(losses_R) == self.world.world_size:
            mine = integers_R4[self.world.rank], losses_R[self.world.rank]
        else:
            mine = integers_R4.sum(0), losses_R.sum()
        if len(losses_R) == self.world.world_size or self.world.is_main:
            self.counts.integers.copy_(mine[0])
            self.counts.loss_sum.copy_(mine[1])
        if self.noise is not None and state["noise"] is not None:
            self.noise.load(state["noise"])
        self.num_steps = int(state["num_steps"])
        self._started -= float(state["seconds"])
