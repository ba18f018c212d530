"""Of several candidates the fastest that is right runs, and every other choice has its reason."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.helpers.step_samples import small_batch, small_trainer
from tests.helpers.wrong_steps import Fast, IgnoresNaN, Raises, Slow, WrongGradient, candidate, read_seconds
from train.distributed.world import World, open_world
from train.graphs.prove import Question, is_better, join_verdicts, prove, start_again
from train.graphs.trial import Candidate, DeviceLostError, Held
from train.graphs.verdict import Record, Verdict, load_verdict, machine_of, task_of
from train.step import StepParts, train_step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thin")]

SMALL = ("model.name=owt", "model.hidden_units=32", "precision=fp32")


class Faster(Fast):
    """A right step that is faster still."""

    seconds = 0.25


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("train.graphs.prover.time_steps", read_seconds)
    before = torch.get_num_threads()
    with open_world("cpu") as one:
        torch.set_num_threads(1)
        yield one
    torch.set_num_threads(before)


def ask(world: World, kinds: Sequence[type[Fast]], *overrides: str) -> Question:
    parts = small_trainer(world, *SMALL, *overrides)
    train_step(parts, [small_batch()], 1e-3, 0)
    machine, task = machine_of(world.device), task_of(parts)
    return Question(parts, [candidate(k) for k in kinds], [small_batch()], 1e-3, 1, machine, task)


@pytest.mark.parametrize(
    ("kinds", "chosen", "why"),
    [
        (
            [WrongGradient, Fast, Faster],
            "Faster",
            "Faster is right, 250 ms; the plain step takes 2e+03 ms; not WrongGradient: in float32 the "
            "(gradient or momentum) of features.3.weight is too large or too small by 0.01, and 2 more "
            "tensor(s) are; Fast is right, 500 ms",
        ),
        ([Slow], "plain", "the plain step takes 2e+03 ms; Slow is right, 3e+03 ms"),
        (
            [Raises, IgnoresNaN],
            "plain",
            "the plain step takes 2e+03 ms; not Raises: it failed with RuntimeError: out of registers; not "
            "IgnoresNaN: a step whose gradient is not finite changes the weights features.0.weight",
        ),
    ],
)
def test_fastest_right_step_is_chosen_and_kept(
    kinds: list[type[Fast]], chosen: str, why: str, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    question = ask(world, kinds)
    held = Held(question.parts)
    with caplog.at_level(logging.INFO, "train"):
        record, step = prove(question)
    # Both are too large by a hundredth; rounding decides which is named.
    said = re.sub("gradient of|change of momentum", "(gradient or momentum) of", record.why)
    assert (record.chosen, said, record.plain_s) == (chosen, why, 2.0)
    assert type(step).__name__ == chosen if chosen != "plain" else step is None
    assert held.changed() == []
    assert caplog.messages == [
        "comparing the fast step with the plain one, once for this machine: it can take a minute"
    ]
    assert load_verdict(question.machine, question.task) == record


def test_first_right_step_is_chosen_untimed_where_bits_repeat(world: World) -> None:
    record, step = prove(ask(world, [WrongGradient, Slow, Faster], "deterministic=true"))
    assert record.chosen == "Slow" and isinstance(step, Slow) and record.plain_s is None
    assert record.why.startswith("Slow is right; not timed (deterministic=true); not WrongGradient: ")
    assert [verdict.seconds for verdict in record.verdicts] == [None] * 3


def test_lack_of_memory_is_not_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Raises, "error", torch.OutOfMemoryError("no room"))
    question = ask(world, [Raises])
    record, step = prove(question)
    assert (record.chosen, step) == ("plain", None) and "OutOfMemoryError: no room" in record.why
    assert load_verdict(question.machine, question.task) is None


def test_batch_without_a_gradient_decides_nothing(world: World) -> None:
    question = ask(world, [Fast])
    with torch.no_grad():
        question.parts.network.get_parameter("features.0.bias")[0] = float("nan")
    record, step = prove(question)
    assert (record.chosen, step) == ("plain", None)
    assert record.why == "the plain step skips the batch that they would be compared on"
    assert load_verdict(question.machine, question.task) is None


def test_known_step_starts_without_a_proof(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    question = ask(world, [Slow, Fast])
    known = Record(chosen="Fast", why="it was", machine=question.machine, task=question.task)
    held = Held(question.parts)
    record, step = start_again(question, known)
    assert record == known and isinstance(step, Fast) and step.calls == 5
    assert held.changed() == []
    plain = Record(chosen="plain", why="it is faster", machine=question.machine, task=question.task)
    assert start_again(question, plain) == (plain, None)
    gone = Record(chosen="other", why="it was", machine=question.machine, task=question.task)
    record, step = start_again(question, gone)
    assert (record.chosen, record.why, step) == ("plain", "other is no step of this version", None)


def test_known_step_that_fails_now_is_not_used(world: World) -> None:
    question = ask(world, [Raises])
    known = Record(chosen="Raises", why="it was", machine=question.machine, task=question.task)
    held = Held(question.parts)
    record, step = start_again(question, known)
    assert (record.chosen, step) == ("plain", None) and held.changed() == []
    assert record.why == "Raises was right and faster, and now it failed with RuntimeError: out of registers"


@pytest.mark.parametrize("known", [False, True])
def test_step_that_breaks_the_device_is_noted_for_the_next_start(
    known: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore, made = Held.restore, list[Fast]()

    def lose(held: Held) -> None:
        if made and made[-1].calls >= 4:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        restore(held)

    def make(parts: StepParts) -> Fast:
        made.append(Raises(parts))
        return made[-1]

    question = ask(world, [])
    question = Question(**{**vars(question), "candidates": [Candidate("new", make)]})
    earlier = Record(chosen="new", why="it was", machine=question.machine, task=question.task)
    monkeypatch.setattr(Held, "restore", lose)
    with pytest.raises(DeviceLostError, match="start again with --resume auto, and the plain step runs"):
        start_again(question, earlier) if known else prove(question)
    kept = load_verdict(question.machine, question.task)
    assert kept is not None and kept.chosen == "plain"
    assert "it failed with RuntimeError: out of registers" in kept.why


def test_verdicts_of_ranks_are_joined() -> None:
    right = [Verdict(name="x", seconds=1.0), Verdict(name="x", seconds=2.0)]
    assert join_verdicts(right) == right[1]
    assert join_verdicts([Verdict(name="x", against="it is off")]).against == "it is off"
    failed = Verdict(name="x", against="it failed", lasting=False)
    assert join_verdicts([right[0], failed]) == Verdict(
        name="x", against="on rank 1 it failed", lasting=False
    )


@pytest.mark.parametrize(
    ("verdict", "best", "plain_s", "better"),
    [
        (Verdict(name="x", seconds=1.0), None, 2.0, True),
        (Verdict(name="x", seconds=2.0), None, 2.0, False),
        (Verdict(name="x", seconds=1.0), Verdict(name="y", seconds=0.9), 2.0, False),
        (Verdict(name="x", seconds=0.8), Verdict(name="y", seconds=0.9), 2.0, True),
        (Verdict(name="x", against="no", seconds=0.1), None, 2.0, False),
        (Verdict(name="x"), None, None, True),
        (Verdict(name="x"), Verdict(name="y"), None, False),
    ],
)
def test_better_is_right_and_faster(
    verdict: Verdict, best: Verdict | None, plain_s: float | None, better: bool
) -> None:
    assert is_better(verdict, best, plain_s) is better
