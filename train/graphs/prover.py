"""Compares a fast step with the plain one on the card at hand, on a real batch of the run.

Loss, every gradient, and what a step changes must be near those of a reference (`train.graphs.agreement`); a
step with a NaN must change nothing. The run's state comes back to the bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data_pipeline.loading.batches import Batch
from train.graphs.agreement import EXACT, NARROW, NONE, NUDGE, RESOLUTION, Gap, gap_between, worst_of
from train.graphs.trial import (
    Candidate,
    Held,
    IncomparableError,
    put_back,
    release,
    state_of,
    time_steps,
    why_failed,
)
from train.graphs.verdict import Verdict
from train.models.parts import head_of
from train.optim.precision import Precision
from train.optim.sgd import ScaledSgd
from train.step import StepFn, StepParts, train_step

log = logging.getLogger("train")

WARM_UP = 5
"""Steps before a fast step is judged: by then it is replayed, and no longer recorded."""
STARTS = 3
"""Weights to begin with, of which one must show no difference: what rounding chooses otherwise, it does not
choose otherwise from everywhere."""
HALVINGS = 24
"""Most steps until float16's loss scale, which halves with each, lets the gradient be finite."""


class Prover:
    """The plain step on a batch, with which fast steps are compared.

    Args:
        parts: of the run.
        batches: this rank's micro-batches of one step, which can be taken again and again.
        rate: learning rate of the steps that are compared.
        step: optimiser steps finished.
    Raises:
        IncomparableError: the batch has no finite gradient.
    """

    def __init__(self, parts: StepParts, batches: Sequence[Batch], rate: float, step: int) -> None:
        self.parts, self.batches, self.rate, self.step = parts, batches, rate, step
        self.plain: StepFn = partial(train_step, parts)
        self.held = Held(parts)
        self._exact = in_float32(parts)
        try:
            self._scale = self._find_scale()
            self._wanted: dict[int, dict[str, Tensor]] = {}
            self._usual = self._gaps(partial(train_step, self._exact), 1, to=0)  # in float32
            self._usual_narrow = {} if self._exact is parts else self._gaps(self.plain)
            changed, self._counted = self._after_nan(self.plain)
            assert not changed, "the plain step skips a step whose gradient is not finite"
        finally:
            self.held.restore()

    def judge(self, candidate: Candidate) -> tuple[Verdict, StepFn | None]:
        """Build a fast step and compare it; also return it, if it may run.

        Every rank must call this.

        Raises:
            DeviceLostError: its failure has left the device unusable.
        """
        fast: StepFn | None = None
        against, lasting = None, True
        try:
            if self._exact is not self.parts:
                against = self._objection(candidate.make(self._exact), in_float32=True)
                release(self.parts)
            if against is None:
                fast = candidate.make(self.parts)
                against = self._objection(fast, in_float32=self._exact is self.parts)
                against = against or self._objection_after_nan(fast)
        except Exception as error:  # a new kernel on a card that nobody has seen can fail in any way
            against, lasting = why_failed(error), not isinstance(error, torch.OutOfMemoryError)
        put_back(self.held, candidate.name, against)
        if self.parts.world.any(against is not None):
            fast = None
        return Verdict(name=candidate.name, against=against, notes=candidate.notes, lasting=lasting), fast

    def time(self, step: StepFn) -> float:
        """Return the seconds of a step on the slowest rank, and bring the run's state back.

        Every rank must call this.
        """
        self._restart()
        seconds = time_steps(step, self.batches, self.step, self.parts.world)
        self.held.restore()
        return seconds

    def _objection(self, fast: StepFn, *, in_float32: bool) -> str | None:
        """Return what a fast step computes otherwise than the plain one in float32; None if nothing.

        Args:
            in_float32: whether the fast one is in float32 too.
        """
        self._restart()
        for _ in range(WARM_UP):
            fast(self.batches, 0.0, self.step)
        worst, exactly = None, "in float32 " if in_float32 else ""
        usual, least = (self._usual, EXACT) if in_float32 else (self._usual_narrow, NARROW)
        for start in range(STARTS):
            gaps, names = self._gaps(fast, start), self._want(start).keys()
            if gaps.keys() != names:
                return f"it has too little or too much: {min(gaps.keys() ^ names)}"
            worst = worst_of(gaps, usual, least)
            if worst is None:
                return None
        return f"{exactly}{worst}"

    def _objection_after_nan(self, fast: StepFn) -> str | None:
        """Return what a fast step does otherwise than the plain one where it meets a NaN; None if nothing."""
        changed, counted = self._after_nan(fast)
        if changed:
            return f"a step whose gradient is not finite changes the {changed[0]}"
        if counted != self._counted:
            return "it counts a step whose gradient is not finite otherwise than the plain one"
        return None

    def _restart(self) -> None:
        """Bring the run's state back, with a loss scale that this batch takes."""
        self.held.restore()
        if self._scale:
            self.parts.scaler.load_state_dict(self._scale)

    def _find_scale(self) -> dict[str, Any]:
        """Find a loss scale under which the plain step is not skipped; nothing outside of float16."""
        self._scale = self.parts.scaler.state_dict()
        before = self.parts.guard.read().total
        for _ in range(HALVINGS if self._scale else 1):
            self._restart()
            self.plain(self.batches, 0.0, self.step)
            if self.parts.guard.read().total == before:
                return self._scale
            self._scale = self.parts.scaler.state_dict()
        raise IncomparableError("the plain step skips the batch that they would be compared on")

    def _outcome(self, step: StepFn, start: int) -> Iterator[tuple[str, Tensor, float]]:
        """Yield by name what a step gives and changes, with the length to which that is known.

        Where the optimiser scales gradients in place, they are seen in velocities that begin at 0.

        Args:
            start: number of the weights to begin with: 0 for the run's, others for nudged ones.
        """
        self._restart()
        scales = isinstance(self.parts.optimizer, ScaledSgd)
        began = dict(self.held.tensors)
        for name, tensor in state_of(self.parts).items():
            if scales and name.startswith("momentum"):
                tensor.zero_()
                began[name] = torch.zeros_like(tensor)
            elif start and name.startswith("weights"):
                nudge(tensor, start)
                began[name] = tensor.detach().clone()
        meter = step(self.batches, self.rate, self.step)
        yield "the loss", meter.loss_sum, 0.0
        yield "the number of samples", meter.integers[[0, 3]], 0.0
        for name, parameter in self.parts.network.named_parameters():
            if parameter.grad is not None and not scales:
                yield f"the gradient of {name}", parameter.grad, 0.0
        for name, tensor in state_of(self.parts).items():
            if not name.startswith("guard"):
                before = began[name].float()
                slack = RESOLUTION * float(torch.linalg.vector_norm(before))
                yield f"the change of {name}", tensor.detach().float() - before, slack

    def _want(self, start: int) -> dict[str, Tensor]:
        """Return what the plain step in float32 gives and changes, on the host."""
        if start not in self._wanted:
            outcome = self._outcome(partial(train_step, self._exact), start)
            self._wanted[start] = {name: tensor.to("cpu", copy=True) for name, tensor, _ in outcome}
        return self._wanted[start]

    def _gaps(self, step: StepFn, start: int = 0, to: int | None = None) -> dict[str, Gap]:
        """Compare a step with the plain one in float32, from the same start or from `to`."""
        want = self._want(start if to is None else to)
        return {
            name: gap_between(tensor, want[name], slack) if name in want else NONE
            for name, tensor, slack in self._outcome(step, start)
        }

    def _after_nan(self, step: StepFn) -> tuple[list[str], list[Any]]:
        """Let a step meet a NaN, in a bias of the last layer.

        Returns:
            The names of what it changed; how guard, loss scale and counts stand then.
        """
        self._restart()
        name, head = head_of(self.parts.network)
        with torch.no_grad():
            head.get_parameter("bias")[0] = float("nan")
        meter = step(self.batches, self.rate, self.step)
        state = state_of(self.parts)
        with torch.no_grad():  # the bias is averaged with a share of 0, and NaN times 0 is NaN
            for key in {f"weights {name}.bias", f"average {name}.bias"} & state.keys():
                state[key][0] = self.held.tensors[key][0]
        changed = [name for name in self.held.changed() if not name.startswith("guard")]
        guard = [tensor.tolist() for tensor in self.parts.guard.state_dict().values()]
        counts = [*meter.integers.tolist(), meter.loss_sum.item()]
        return changed, [guard, self.parts.scaler.state_dict(), counts]


@torch.no_grad()
def nudge(weights: Tensor, seed: int) -> None:
    """Change each weight by a random share of it, of at most `NUDGE`."""
    generator = torch.Generator(weights.device).manual_seed(seed)
    uniform = torch.rand(weights.shape, generator=generator, device=weights.device)
    weights.mul_(uniform.mul_(2 * NUDGE).add_(1 - NUDGE))


def in_float32(parts: StepParts) -> StepParts:
    """Return the parts with passes in float32; the same parts where they are already."""
    if parts.precision.name == "fp32":
        return parts
    precision = Precision("fp32", parts.world.device.type, "to compare with")
    return replace(parts, precision=precision, scaler=precision.make_scaler())
