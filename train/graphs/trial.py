"""Trying a fast step: on a run's state, which is put aside and comes back to the bit; and how it can end."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from timeit import repeat
from typing import Any

import torch
from torch import Tensor

from data_pipeline.common.errors import RankLostError
from data_pipeline.loading.batches import Batch
from train.compile.choose import first_line
from train.distributed.measure import wait_for
from train.distributed.world import World
from train.step import StepFn, StepParts

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


class Held:
    """A copy of all that a step changes: weights, momenta, statistics, average, guard, loss scale.

    Gradients are no state: they are whatever the last step left.
    """

    def __init__(self, parts: StepParts) -> None:
        self._parts = parts
        self.tensors = {name: tensor.detach().clone() for name, tensor in state_of(parts).items()}
        self._scale = copy.deepcopy(parts.scaler.state_dict())
        self._rates = [group["lr"] for group in parts.optimizer.param_groups]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the copy back. Tensors stay where they are, as captured work needs it."""
        for name, tensor in state_of(self._parts).items():
            tensor.copy_(self.tensors[name])
        if self._scale:
            self._parts.scaler.load_state_dict(self._scale)
            self._parts.scaler._per_optimizer_states.clear()  # of a step that ended with an error
        for group, rate in zip(self._parts.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate

    def changed(self) -> list[str]:
        """Name what is not what it was when it was put aside, by its bits. Waits for the device."""
        now = state_of(self._parts)
        return [name for name, tensor in now.items() if not same_bits(tensor, self.tensors[name])]


def state_of(parts: StepParts) -> dict[str, Tensor]:
    """Return the tensors that a step changes in place, by name for people."""
    network, optimizer = parts.network, parts.optimizer
    names: dict[Tensor, str] = {parameter: name for name, parameter in network.named_parameters()}
    tensors: dict[str, Any] = {f"weights {name}": p for name, p in network.named_parameters()}
    tensors |= {f"statistics {name}": buffer for name, buffer in network.named_buffers()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"momentum {names[parameter]}": v for v in state.values() if isinstance(v, Tensor)}
    if parts.ema is not None:
        tensors |= {f"average {name}": value for name, value in parts.ema.values.items()}
    tensors |= {f"guard's {name}": value for name, value in parts.guard.state_dict().items()}
    return tensors


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same bits; NaN equals itself."""
    as_bytes = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*as_bytes)


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
    work, clock = partial(step, batches, 0.0, at), partial(wait_for, world.device)
    bursts_s = repeat(work, timer=clock, number=BURST, repeat=1 + ROUNDS)  # the first is the warm-up
    return world.max(min(bursts_s) / BURST)[0]
