"""Finds the step that is right and fastest here, once a machine, and starts the one that was found."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from data_pipeline.loading.batches import Batch
from train.graphs.prover import WARM_UP, Prover
from train.graphs.trial import (
    Candidate,
    DeviceLostError,
    Held,
    IncomparableError,
    put_back,
    release,
    why_failed,
)
from train.graphs.verdict import PLAIN, Record, Verdict, save_verdict
from train.step import StepFn, StepParts

log = logging.getLogger("train")


@dataclass(frozen=True)
class Question:
    """The steps to choose from, and the batch that they are compared on.

    Attributes:
        parts: of the run.
        candidates: the fast steps, the most promising first.
        batches: this rank's micro-batches of one step, which can be taken more than once.
        rate: the highest learning rate of the run.
        step: optimiser steps finished.
        machine, task: see `Record`.
    """

    parts: StepParts
    candidates: Sequence[Candidate]
    batches: Sequence[Batch]
    rate: float
    step: int
    machine: dict[str, str]
    task: dict[str, str]

    def record(self, chosen: Verdict | None, plain_s: float | None, verdicts: Sequence[Verdict]) -> Record:
        """Put an answer together: for the step of a verdict, or for the plain one."""
        return Record(
            chosen=PLAIN if chosen is None else chosen.name,
            why=why_of(chosen, plain_s, verdicts),
            machine=self.machine,
            task=self.task,
            plain_s=plain_s,
            verdicts=tuple(verdicts),
        )


def prove(question: Question) -> tuple[Record, StepFn | None]:
    """Compare every candidate with the plain step, and keep the answer for the next run on this machine.

    Every rank must call this. The run's state is the same before and after.

    Returns:
        The answer, the same on all ranks; the fast step that runs, or None for the plain one.
    Raises:
        DeviceLostError: a candidate has left the device unusable; the answer that is kept is against it.
    """
    parts, world = question.parts, question.parts.world
    if world.is_main:
        log.info("comparing the fast step with the plain one, once for this machine: it can take a minute")
    try:
        prover = Prover(parts, question.batches, question.rate, question.step)
    except IncomparableError as error:
        return Record(chosen=PLAIN, why=str(error), machine=question.machine, task=question.task), None
    timed = not parts.config.deterministic
    plain_s = prover.time(prover.plain) if timed else None
    verdicts: list[Verdict] = []
    best: Verdict | None = None
    chosen: StepFn | None = None
    for candidate in question.candidates:
        try:
            own, fast = prover.judge(candidate)
        except DeviceLostError as error:
            verdicts.append(Verdict(name=candidate.name, against=error.failure))
            save_verdict(question.record(None, plain_s, verdicts))
            raise
        if fast is not None and timed:
            own = msgspec.structs.replace(own, seconds=prover.time(fast))
        verdict = join_verdicts(world.gather_objects(own))
        verdicts.append(verdict)
        if is_better(verdict, best, plain_s):
            best, chosen = verdict, fast
        del fast
        release(parts)
    answer = question.record(best, plain_s, verdicts)
    if world.is_main:
        save_verdict(answer)
    return answer, chosen


def start_again(question: Question, known: Record) -> tuple[Record, StepFn | None]:
    """Start the step that was found right and fastest earlier; the plain one if that fails on any rank.

    Every rank must call this. The run's state is the same before and after.

    Returns:
        The answer, the same on all ranks; the fast step that runs, or None for the plain one.
    Raises:
        DeviceLostError: it has left the device unusable; the answer that is kept is against it from now on.
    """
    parts = question.parts
    candidate = next((one for one in question.candidates if one.name == known.chosen), None)
    if candidate is None:
        why = known.why if known.chosen == PLAIN else f"{known.chosen} is no step of this version"
        return msgspec.structs.replace(known, chosen=PLAIN, why=why), None
    held, fast, failure = Held(parts), None, None
    try:
        fast = candidate.make(parts)
        for _ in range(WARM_UP):
            fast(question.batches, 0.0, question.step)
    except Exception as error:
        failure = why_failed(error)
    verdict = Verdict(name=candidate.name, against=failure)
    against = f"{candidate.name} was right and faster, and now {failure}"
    refusal = msgspec.structs.replace(known, chosen=PLAIN, why=against, verdicts=(verdict,))
    try:
        put_back(held, candidate.name, failure)
    except DeviceLostError:
        save_verdict(refusal)
        raise
    if not parts.world.any(failure is not None):
        return known, fast
    del fast
    release(parts)
    return parts.world.broadcast_object(lambda: refusal), None


def join_verdicts(verdicts: Sequence[Verdict]) -> Verdict:
    """Join what the ranks found out about a candidate: the first objection, the longest time."""
    objecting = next(((rank, v) for rank, v in enumerate(verdicts) if v.against is not None), None)
    seconds = [verdict.seconds for verdict in verdicts if verdict.seconds is not None]
    if objecting is None:
        return msgspec.structs.replace(verdicts[0], seconds=max(seconds, default=None))
    rank, verdict = objecting
    against = f"on rank {rank} {verdict.against}" if len(verdicts) > 1 else verdict.against
    return msgspec.structs.replace(
        verdict, against=against, seconds=None, lasting=all(one.lasting for one in verdicts)
    )


def is_better(verdict: Verdict, best: Verdict | None, plain_s: float | None) -> bool:
    """Return whether a candidate takes the place of the best so far: the plain step if that is None.

    Untimed, the first that computes what the plain step does is the best.
    """
    if verdict.against is not None:
        return False
    if verdict.seconds is None or plain_s is None:
        return best is None
    return verdict.seconds < (plain_s if best is None or best.seconds is None else best.seconds)


def why_of(chosen: Verdict | None, plain_s: float | None, verdicts: Sequence[Verdict]) -> str:
    """Say why a step was chosen, for people."""

    def judged(verdict: Verdict) -> str:
        if verdict.against is not None:
            return f"not {verdict.name}: {verdict.against}"
        return f"{verdict.name} is right" + (
            f", {_ms(verdict.seconds)}" if verdict.seconds is not None else ""
        )

    first = [verdict for verdict in verdicts if verdict is chosen]
    others = [verdict for verdict in verdicts if verdict is not chosen]
    timed = (
        f"the plain step takes {_ms(plain_s)}" if plain_s is not None else "not timed (deterministic=true)"
    )
    return "; ".join([*map(judged, first), timed, *map(judged, others)])


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms"
