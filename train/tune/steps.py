"""A recipe's own training steps, for benchmarks: everything is as in a run, and nothing stays of it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

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
    """Steps of a run of one rank, taken one by one.

    Args:
        steps: the micro-batches of each, without end.
    """

    run_state: RunState
    steps: Iterator[list[Batch]]

    def step(self, learning_rate: float) -> Metrics:
        """Train one step, and wait for what it came to; loss and accuracy are NaN of a step that was skipped.

        Raises:
            KeyboardInterrupt: a signal asked to stop.
        """
        run_state = self.run_state
        if run_state.interrupt.received:
            raise KeyboardInterrupt(run_state.interrupt.received)
        counts = train_step(run_state.parts, next(self.steps), learning_rate, run_state.step)
        run_state.step += 1
        return counts.reduce(run_state.parts.world)


@contextmanager
def open_probe(config: RunConfig) -> Iterator[Probe]:
    """Open the data, build the network, and stand before the first step.

    Raises:
        UserError: from the parts, as in a run.
    """
    with ExitStack() as stack:
        world = stack.enter_context(open_world(config.device, config.timeout_s))
        run_state = build_run(config, None, "none", world, stack)
        yield Probe(run_state, open_steps(run_state, stack, None))


def wait_for(device: torch.device) -> float:
    """The time once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def noise_batch(size: int, crop_px: int, num_classes: int) -> Batch:
    """A step's samples without a file behind them; the same ones every time."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (size, crop_px, crop_px, 3), dtype=np.uint8)
    labels, places = random.integers(0, num_classes, size), np.arange(size)
    return Batch(images, labels, np.ones(size, bool), places, places, (), (), step=0, last=True)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory this process has held: on the GPU, what torch held there; on a CPU, the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
