"""Fast steps that could run, and how trying one can end."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from data_pipeline.common.errors import RankLostError
from data_pipeline.loading.batches import Batch
from train.compile.choose import first_line
from train.distributed.world import World
from train.graphs.held import Held
from train.step import StepFn, StepParts

Timer = Callable[[StepFn], float]
"""Returns the seconds of a step."""
BURST, ROUNDS = 10, 3
"""Steps that are timed at once, and how often; the fastest counts."""


@dataclass(frozen=True)
class Candidate:
    """A fast step that could run.

    Attributes:
        name: for people, and for the next run on this machine.
        make: builds it for a run's parts; it may fail.
        notes: see `Verdict`.
    """

    name: str
    make: Callable[[StepParts], StepFn]
    notes: tuple[str, ...] = ()


class DeviceLostError(RankLostError):
    """A fast step has left the device in a state in which nothing runs.

    Args:
        name: of the fast step.
        failure: what happened, for people.
    """

    def __init__(self, name: str, failure: str) -> None:
        super().__init__(
            f"the step `{name}` has left the device unusable: {failure}. That is noted: start again with "
            "--resume auto, and the plain step runs"
        )
        self.failure = failure


class IncomparableError(RuntimeError):
    """The batch at hand shows nothing: the plain step does not take it."""


def put_back(held: Held, name: str, failure: str | None) -> None:
    """Bring the run's state back after steps of a candidate.

    Raises:
        DeviceLostError: the device does nothing any more.
    """
    try:
        held.restore()
    except RuntimeError as error:
        raise DeviceLostError(name, failure or first_line(error)) from error


def release(parts: StepParts) -> None:
    """Give back the memory of steps that are not used any more: what is captured refers to itself."""
    parts.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if parts.world.device.type == "cuda":
        torch.cuda.empty_cache()


def why_failed(error: Exception) -> str:
    """Say that a candidate failed, for people.

    Raises:
        RankLostError: it was not the candidate, but another rank.
    """
    if isinstance(error, RankLostError):
        raise error
    return f"it failed with {first_line(error)}"


def time_steps(step: StepFn, batches: Sequence[Batch], at: int, world: World) -> float:
    """Return the seconds of a step on the slowest rank: of the fastest of `ROUNDS` bursts.

    The learning rate is 0, so that weights stay. Every rank must call this.
    """
    best = float("inf")
    for _ in range(ROUNDS + 1):  # the first is the warm-up
        started = perf_counter()
        for _ in range(BURST):
            step(batches, 0.0, at)
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)
        best = min(best, (perf_counter() - started) / BURST)
    return world.max(best)[0]
