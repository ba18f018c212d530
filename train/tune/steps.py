"""A recipe's own training steps, one by one: as in a run, but nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from train.config.schema import RunConfig
from train.distributed.world import open_world
from train.health.metrics import Metrics
from train.loop import open_steps
from train.setup import build_run
from train.state import RunState
from train.step import train_step


@contextmanager
def open_probe(config: RunConfig) -> Iterator[tuple[RunState, Callable[[float], Metrics]]]:
    """Open the data and build the network of a run of one rank; yield the run, and what trains a step of it.

    That is a function which takes the learning rate and waits for the step's metrics: NaN if it was skipped.
    It raises KeyboardInterrupt where a signal asked to stop.

    Raises:
        UserError: from the parts, as in a run.
    """
    with ExitStack() as stack:
        world = stack.enter_context(
            open_world(config.device, config.timeout_s, deterministic=config.deterministic)
        )
        run = build_run(config, None, "none", world, stack)
        steps = open_steps(run, stack, None)

        def step(learning_rate: float) -> Metrics:
            if run.interrupt.received:
                raise KeyboardInterrupt(run.interrupt.received)
            counts = train_step(run.parts, next(steps), learning_rate, run.step)
            run.step += 1
            return counts.reduce(world)

        yield run, step
