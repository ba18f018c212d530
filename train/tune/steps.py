"""A recipe's own training steps, one by one: as in a run, but nothing is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from data_pipeline.loading.prefetch import Batch
from train.config.schema import RunConfig
from train.distributed.world import open_world
from train.health.metrics import Metrics
from train.loop import open_steps
from train.setup import build_run
from train.state import RunState
from train.step import train_step


@dataclass
class Probe:
    """A run of one rank before its next step; `steps` are the micro-batches of each, without end."""

    run: RunState
    steps: Iterator[list[Batch]]

    def step(self, learning_rate: float) -> Metrics:
        """Train one step, and wait for its metrics; loss and accuracy are NaN if the step was skipped.

        Raises:
            KeyboardInterrupt: a signal asked to stop.
        """
        run = self.run
        if run.interrupt.received:
            raise KeyboardInterrupt(run.interrupt.received)
        counts = train_step(run.parts, next(self.steps), learning_rate, run.step)
        run.step += 1
        return counts.reduce(run.parts.world)


@contextmanager
def open_probe(config: RunConfig) -> Iterator[Probe]:
    """Open the data and build the network.

    Raises:
        UserError: from the parts, as in a run.
    """
    with ExitStack() as stack:
        world = stack.enter_context(open_world(config.device, config.timeout_s))
        run = build_run(config, None, "none", world, stack)
        yield Probe(run, open_steps(run, stack, None))
