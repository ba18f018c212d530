"""The fast step against the plain one: recorded once at step 0 as a CUDA graph is, it gives the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train.step
from tests.helpers.fast_steps import (
    BAD_STEP,
    GLOBAL_BATCH,
    RANKS_CASES,
    batches_at,
    compare,
    differing,
    make_parts,
    rate_at,
    state_of,
    take_steps,
)
from tests.helpers.plain_kernels import PLAIN
from tests.helpers.recorder import HostValueError, Recorder, run_every_time
from tests.helpers.warm_ranks import run_ranks
from train.compile.fused import FusedNetwork
from train.compile.update import update_weights
from train.config.load import make_config
from train.distributed.world import World, open_world
from train.graphs.capture import CudaCapture
from train.graphs.fast_step import FastStep, why_not
from train.health.nonfinite import Guard
from train.optim.half_weights import HalfWeights
from train.optim.sgd import Apply
from train.step import train_step, training_inputs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thin")]

CASES: dict[str, tuple[Sequence[str], int, bool]] = {
    "sgd": (("model.name=paper",), GLOBAL_BATCH, False),
    "float16's scaler": (("model.name=owt", "optimizer.nesterov=true"), GLOBAL_BATCH, True),
    "paper's velocity": (("model.name=caffe", "optimizer.momentum_form=paper"), 6, True),
    "lars": (("model.name=bn", "optimizer.name=lars", "optimizer.momentum_form=paper"), GLOBAL_BATCH, True),
    "ghost batches": (("model.name=bn", "model.norm_batch=4"), GLOBAL_BATCH, False),
    "micro-batches": (("model.name=bn", "model.norm_batch=2", "optimizer.name=lars"), 4, True),
}


@pytest.fixture
def world() -> Iterator[World]:
    with open_world("cpu") as one:
        yield one


@pytest.mark.parametrize("case", CASES)
def test_recording_of_step_0_gives_the_plain_steps_bits(world: World, case: str) -> None:
    """50 steps: a warm-up, a decay, an average, mixed and erased images, bad files, and a step skipped."""
    sets, micro_batch, scaled = CASES[case]
    assert compare(world, sets, Recorder(), scaled=scaled, micro_batch=micro_batch) == ([], [])


@pytest.mark.parametrize("case", CASES)
def test_recordings_of_steps_0_and_1000_are_the_same(world: World, case: str) -> None:
    sets, micro_batch, scaled = CASES[case]
    assert recorded(world, 0, sets, micro_batch, scaled) == recorded(world, 1000, sets, micro_batch, scaled)


def recorded(world: World, step: int, sets: Sequence[str], micro_batch: int, scaled: bool) -> list[Any]:
    """The operations of one step, with their host arguments."""
    recorder, parts = Recorder(), make_parts(world, *sets, f"micro_batch={micro_batch}", scaled=scaled)
    FastStep(parts, recorder)(batches_at(world, step, micro_batch), rate_at(step % 37), step)
    found = [call for recording in recorder.recordings for call in recording.host_arguments()]
    assert len(found) > 100
    return found


def test_rate_that_is_frozen_is_found_by_both(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def frozen(optimizer: torch.optim.SGD, skip: Tensor, rates: Sequence[Tensor], apply: Apply) -> None:
        del rates  # the optimiser has those on the host
        apply(optimizer, skip)

    monkeypatch.setattr(train.step, "update", frozen)
    state, steps = compare(world, (), Recorder(), num_steps=3)
    assert "weight features.conv1.weight" in state and steps == [2]  # the rate is another from step 1 on
    assert recorded(world, 0, (), GLOBAL_BATCH, False) != recorded(world, 1000, (), GLOBAL_BATCH, False)


@pytest.mark.parametrize(
    ("host", "name"),
    [
        (lambda step: torch.zeros_like(step) + int(step), "_local_scalar_dense"),
        (lambda _: torch.tensor(7), "lift"),
    ],
)
def test_value_on_the_host_is_refused_with_its_line(
    world: World, monkeypatch: pytest.MonkeyPatch, host: Callable[[Tensor], Tensor], name: str
) -> None:
    kept = Guard.should_skip
    monkeypatch.setattr(Guard, "should_skip", lambda guard, grads, step: kept(guard, grads, host(step)))
    with pytest.raises(HostValueError, match=rf"{name}\w* at fast_step.py:\d+: skip = parts.guard"):
        FastStep(make_parts(world), Recorder())(batches_at(world, 0), 0.1, 0)


def test_fast_and_plain_steps_can_take_turns(world: World) -> None:
    plain, turns = (make_parts(world, "model.name=bn", scaled=True) for _ in range(2))
    take_steps(plain, [partial(train_step, plain)], 6)
    fast = FastStep(turns, Recorder())
    counts = take_steps(turns, [fast, fast, partial(train_step, turns)], 6)
    assert differing(plain, turns) == [] and len({float(c.loss_sum) for c in counts}) == 6
    for own, other in zip(plain.network.parameters(), turns.network.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None and torch.equal(own.grad, other.grad)


@pytest.mark.parametrize("form", ["torch", "paper"])
def test_own_pass_of_the_optimiser_is_captured_as_torchs_is(world: World, form: str) -> None:
    """The copies of the weights are written by the step, and before it where others changed the weights."""
    sets = ("model.name=bn", f"optimizer.momentum_form={form}", "model.dropout=0.2")
    plain, own = (make_parts(world, *sets) for _ in range(2))
    halves = HalfWeights(own.network, torch.bfloat16, own.optimizer)
    apply = partial(update_weights, halves=halves, kernels=PLAIN)
    fast = FastStep(own, Recorder(), apply=apply, before=halves.refresh)
    take_steps(plain, [partial(train_step, plain)], 12)
    take_steps(own, [fast, fast, partial(train_step, own)], 12)
    halves.refresh()
    for parameter, other in zip(own.network.parameters(), plain.network.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6)
        copy = halves.copy_of(parameter)
        assert copy is None or torch.equal(copy, parameter.bfloat16())


@pytest.mark.parametrize("name", ["caffe", "bn"])
def test_fused_network_is_captured_as_its_own_layers_are(world: World, name: str) -> None:
    """Sums are in another order; nothing of a step may be left in what is captured."""
    sets = (f"model.name={name}", "model.dropout=0.2")
    plain, fused = (make_parts(world, *sets) for _ in range(2))
    network = FusedNetwork(fused.network, PLAIN)
    recorder = Recorder()
    fast = FastStep(fused, recorder, lambda inputs: network(training_inputs(inputs, fused.normalize)))
    take_steps(plain, [partial(train_step, plain)], 12)
    take_steps(fused, [fast], 12)
    assert len(recorder.recordings) == 1
    for own, other in zip(state_of(plain).values(), state_of(fused).values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-5)


def test_two_ranks_take_the_plain_steps_of_two_ranks(tmp_path: Path) -> None:
    done = run_ranks(2, ["tests.helpers.fast_steps"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [{name: [[], []] for name in RANKS_CASES}] * 2


def test_runs_with_work_inside_of_the_passes_keep_the_plain_step() -> None:
    one = World(0, 1, 0, 1, torch.device("cpu"))
    two = World(0, 2, 0, 2, torch.device("cpu"))
    for more, alone, together in (
        ((), None, None),
        (("log_noise_scale=true",), "log_noise_scale measures", "log_noise_scale measures"),
        (("parallel=hybrid",), None, "parallel=hybrid exchanges"),
        (("compress=bf16",), None, "compress=bf16 rounds"),
        (("model.name=bn",), None, "norms take their statistics over all ranks"),
        (("model.name=bn", "model.norm_batch=4"), None, None),
    ):
        config = make_config("demo", more)
        for world, expected in ((one, alone), (two, together)):
            found = why_not(config, world)
            assert (found is None) is (expected is None) and (found or "").startswith(expected or "")


def test_work_that_runs_every_time_gives_the_plain_steps_bits(world: World) -> None:
    assert compare(world, (), run_every_time, num_steps=BAD_STEP + 2) == ([], [])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("micro_batch", [GLOBAL_BATCH, 4])
def test_graph_on_a_gpu_gives_the_plain_steps_weights(precision: str, micro_batch: int) -> None:
    """20 steps; sums by atomics may be in another order from run to run, so not to the bit."""
    with open_world("cuda") as world:
        sets = (f"precision={precision}", f"micro_batch={micro_batch}", "device=cuda")
        plain, graphed = (make_parts(world, *sets) for _ in range(2))
        take_steps(plain, [partial(train_step, plain)], 20, micro_batch)
        take_steps(graphed, [FastStep(graphed, CudaCapture(world.device))], 20, micro_batch)
        for name, tensor in plain.network.state_dict().items():
            other = graphed.network.state_dict()[name]
            tolerance = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 1e-3}[precision]
            torch.testing.assert_close(tensor, other, rtol=tolerance, atol=tolerance, msg=name)
        assert graphed.guard.read() == plain.guard.read()
