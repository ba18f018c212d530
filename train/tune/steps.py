"""A recipe's own training steps, for benchmarks: everything is as in a run, and nothing stays of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from data_pipeline.loader import Batch
from train.config.load import RunConfig
from train.distributed.world import open_world
from train.health.metrics import Metrics
from train.loop import open_steps
from train.setup import Session, open_session
from train.step import train_step


@dataclass
class Probe:
    """Steps of a run of one rank, taken one by one.

    Args:
        steps: the micro-batches of each, without end.
    """

    session: Session
    steps: Iterator[list[Batch]]

    def step(self, learning_rate: float) -> Metrics:
        """Train one step, and wait for what it came to; loss and accuracy are NaN of a step that was skipped.

        Raises:
            KeyboardInterrupt: a signal asked to stop.
        """
        session = self.session
        if session.interrupt:
            raise KeyboardInterrupt(session.interrupt.received)
        counts = train_step(session.trainer, next(self.steps), learning_rate, session.step)
        session.step += 1
        return counts.reduce(session.trainer.world)


@contextmanager
def open_probe(config: RunConfig) -> Iterator[Probe]:
    """Open the data, build the network, and stand before the first step.

    Raises:
        UserError: from the parts, as in a run.
    """
    with ExitStack() as stack:
        world = stack.enter_context(open_world(config.device, config.timeout_s))
        session = open_session(config, None, "none", world, stack)
        yield Probe(session, open_steps(session, stack, None))
