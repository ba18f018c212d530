"""A fast step that is right passes; one that is wrong in any way does not, and says in which."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from data_pipeline.loading.batches import Batch
from tests.helpers.step_samples import small_batch, small_trainer
from tests.helpers.wrong_steps import (
    CountsOtherwise,
    Fast,
    IgnoresNaN,
    MissingGradient,
    Raises,
    WrongGradient,
    WrongRate,
    candidate,
    read_seconds,
)
from train.distributed.world import World, open_world
from train.graphs.prover import Prover
from train.graphs.trial import Candidate, DeviceLostError, Held, IncomparableError, state_of, time_steps
from train.health.metrics import AccuracyMeter
from train.step import StepParts, train_step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thin")]

SMALL = ("model.name=owt", "model.hidden_units=32", "model.dropout=0.0", "ema_decay=0.9", "cpu_threads=1")


@pytest.fixture
def world() -> Iterator[World]:
    before = torch.get_num_threads()
    with open_world("cpu") as one:
        torch.set_num_threads(1)
        yield one
    torch.set_num_threads(before)


def trained(world: World, *overrides: str) -> StepParts:
    """Parts that have made two steps, so that no momentum is 0."""
    parts = small_trainer(world, *SMALL, *overrides)
    for step in range(2):
        train_step(parts, [small_batch()], 1e-3, step)
    return parts


def prover_of(parts: StepParts) -> Prover:
    return Prover(parts, [small_batch()], rate=1e-3, step=2)


@pytest.fixture(params=["fp32", "bf16"])
def prover(world: World, request: pytest.FixtureRequest) -> Prover:
    return prover_of(trained(world, f"precision={request.param}"))


def test_step_that_is_right_passes_and_is_timed(prover: Prover, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.graphs.prover.time_steps", read_seconds)
    before = {name: tensor.clone() for name, tensor in state_of(prover.parts).items()}
    verdict, step = prover.judge(candidate(Fast))
    assert (verdict.name, verdict.against, verdict.lasting) == ("Fast", None, True)
    assert isinstance(step, Fast) and step.parts is prover.parts and prover.time(step) == 0.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(prover.parts).items())


WRONG: dict[type[Fast], str] = {
    WrongGradient: "in float32 the gradient of features.3.weight is too large or too small by 0.01",
    MissingGradient: "it has too little or too much: the gradient of features.3.weight",
    WrongRate: "in float32 the change of ",
    IgnoresNaN: "a step whose gradient is not finite changes the ",
    CountsOtherwise: "it counts a step whose gradient is not finite otherwise than the plain one",
}


def test_steps_that_are_wrong_do_not_pass(prover: Prover) -> None:
    held = Held(prover.parts)
    for wrong, against in WRONG.items():
        verdict, step = prover.judge(candidate(wrong))
        assert verdict.against is not None
        assert verdict.against.startswith(against)
        assert (step, verdict.lasting) == (None, True)
        assert held.changed() == []


FAILURES: dict[Exception, tuple[str, bool]] = {
    RuntimeError("out of registers\nmore"): ("it failed with RuntimeError: out of registers", True),
    torch.OutOfMemoryError("no room"): ("it failed with OutOfMemoryError: no room", False),
    KeyError(): ("it failed with KeyError", True),
}


def test_steps_that_fail_are_a_reason(prover: Prover, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held(prover.parts)
    for error, (against, lasting) in FAILURES.items():
        monkeypatch.setattr(Raises, "error", error)
        verdict, step = prover.judge(candidate(Raises))
        assert (verdict.against, step, verdict.lasting) == (against, None, lasting)
        assert held.changed() == []
    counts = train_step(prover.parts, [small_batch()], 0.0, 2)  # the plain step still works
    assert counts.integers[0] == 4


def test_step_in_float32_is_gone_before_the_other_is_made(world: World) -> None:
    """Both hold the memory of a whole step, and what is captured refers to itself."""
    living: list[list[bool]] = []
    made: list[weakref.ref[Fast]] = []

    def make(parts: StepParts) -> Fast:
        living.append([step() is not None for step in made])
        step: Any = Fast(parts)
        step.itself = step
        made.append(weakref.ref(step))
        return cast(Fast, step)

    verdict, _ = prover_of(trained(world, "precision=bf16")).judge(Candidate("x", make))
    assert verdict.against is None and living == [[], [False]]


def test_loss_scale_is_found_and_comes_back(world: World) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    parts = replace(trained(world, "precision=fp32"), scaler=scaler)
    verdict, _ = prover_of(parts).judge(candidate(Fast))
    assert verdict.against is None
    assert scaler.get_scale() == 2.0**127 and parts.guard.read().total == 0
    verdict, _ = prover_of(parts).judge(candidate(Raises))
    assert verdict.against == "it failed with RuntimeError: out of registers"
    train_step(parts, [small_batch()], 0.0, 2)  # `unscale_` is not one too many
    assert scaler.get_scale() == 2.0**126


def test_batch_that_the_plain_step_skips_shows_nothing(world: World) -> None:
    parts = trained(world, "precision=fp32")
    with torch.no_grad():
        parts.network.get_parameter("features.0.bias")[0] = float("nan")
    held = Held(parts)
    with pytest.raises(IncomparableError, match="the plain step skips the batch"):
        prover_of(parts)
    assert held.changed() == []


def test_device_that_does_nothing_any_more_ends_the_run(
    prover: Prover, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Held.restore

    def lose(held: Held) -> None:
        if made and made[-1].calls >= 4:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        restore(held)

    made: list[Fast] = []

    def make(parts: StepParts) -> Fast:
        made.append(Raises(parts))
        return made[-1]

    with monkeypatch.context() as patched, pytest.raises(DeviceLostError) as caught:
        patched.setattr(Held, "restore", lose)
        prover.judge(Candidate("new", make))
    assert "the step `new` has left the device unusable: it failed with RuntimeError: out" in str(
        caught.value
    )
    assert "start again with --resume auto, and the plain step runs" in str(caught.value)
    prover.held.restore()


def test_steps_are_timed_in_bursts_at_a_rate_of_0(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, rates = iter([0.0, 9.0, 10.0, 15.0, 20.0, 24.0, 30.0, 36.0]), []
    monkeypatch.setattr("train.graphs.trial.wait_for", lambda _: next(seconds))

    def step(batches: Sequence[Batch], rate: float, at: int) -> AccuracyMeter:
        rates.append(rate)
        return AccuracyMeter(world.device)

    found = time_steps(step, [], 7, world)
    assert found == pytest.approx(0.4) and rates == [0.0] * 40
