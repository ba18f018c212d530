"""Bad gradients never reach the weights: they are skipped, counted and logged; too many end the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from data_pipeline.common.errors import CorruptFileError, DivergedError
from data_pipeline.loading.batches import Batch
from tests.helpers.faulty_rank import fail
from tests.helpers.ranks import TINY, link_subset, read_rows
from tests.helpers.warm_ranks import run_ranks
from train.checkpoints.load import load_checkpoint
from train.checkpoints.retention import saved_steps
from train.config.load import make_config
from train.distributed.world import open_world
from train.health.nonfinite import SPIKE_WARMUP, Guard, SkipStats, all_finite, propagate_nonfinite
from train.loop import save
from train.setup import build_run
from train.state import RunState
from train.step import train_step

pytestmark = pytest.mark.usefixtures("thin")

CPU = torch.device("cpu")
BATCH = 25


@pytest.fixture(scope="module")
def digits(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_subset(demo_data, tmp_path_factory.mktemp("guard") / "data", num_train=100, num_val=10)


@pytest.fixture
def run(digits: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RunState]:
    """A run of one rank, about to begin, of the network with running statistics, and an average of both."""
    sets = [
        *TINY,
        "model.name=bn",
        "ema_decay=0.9",
        f"global_batch={BATCH}",
        "epochs=1",
        "keep_checkpoints=1",
        *getattr(request, "param", ()),
    ]
    with ExitStack() as stack:
        world = stack.enter_context(open_world("cpu"))
        yield build_run(make_config("demo", sets, digits), tmp_path, "none", world, stack)


def first_batch(run: RunState) -> Batch:
    batches = run.loader.train(run.train_set, run.config.augment, seed=0, global_batch=BATCH, num_steps=1)
    with closing(batches):
        return next(batches)


def fail_next(run: RunState, kind: str) -> Any:
    """Make the network's next forward passes fail; `remove()` the hook that is returned."""

    def hook(module: object, images: object, logits_NC: Tensor) -> Tensor:
        return fail(kind, logits_NC)

    return run.parts.network.register_forward_hook(hook)


def held(run: RunState) -> list[Tensor]:
    """Weights, running statistics, momenta and the average of the weights, copied."""
    parts = run.parts
    assert parts.ema is not None
    momenta = [s["momentum_buffer"] for s in parts.optimizer.state.values()]
    averages = parts.ema.values.values()
    return [t.clone() for t in (*parts.network.state_dict().values(), *momenta, *averages)]


def check_skipped(run: RunState) -> None:
    run.abort.check_skipped_steps(run.parts.guard.read(), run.parts.scaler, step=run.step, seen=run.skipped)


def check_weights(run: RunState) -> None:
    run.abort.check_weights(run.parts.network, run.parts.optimizer, run.parts.world, run.step)


@pytest.mark.parametrize(
    ("kind", "run"), [("nan", ()), ("inf", ("model.norm_batch=5",)), ("gradient", ())], indirect=["run"]
)
def test_bad_step_changes_nothing_even_as_the_first(run: RunState, kind: str) -> None:
    batch, before = first_batch(run), held(run)
    hook = fail_next(run, kind)
    counts = train_step(run.parts, [batch], 0.01, 0)
    hook.remove()
    assert all(torch.equal(new, old) for new, old in zip(held(run), before, strict=True))
    assert run.parts.guard.read() == SkipStats(total=1, spikes=0, in_row=1, first=0)
    assert (counts.integers.tolist(), counts.loss_sum.item()) == ([0, 0, 0, 0], 0.0)
    counts = train_step(run.parts, [batch], 0.01, 1)
    assert run.parts.guard.read() == SkipStats(total=1, spikes=0, in_row=0, first=0)
    assert counts.integers[0].item() == BATCH
    after = held(run)
    assert not all(torch.equal(new, old) for new, old in zip(after, before, strict=True))
    assert all_finite(after)


def test_infinite_loss_makes_gradients_nan_and_a_finite_one_none() -> None:
    for value in (1.7, float("inf"), float("nan")):
        loss = torch.tensor(value, requires_grad=True)
        torch.autograd.backward(propagate_nonfinite(loss))
        assert loss.grad is not None
        assert torch.equal(propagate_nonfinite(loss), loss) is (loss.grad.item() == 1.0) is (value == 1.7)


def test_guard_skips_every_step_from_its_limit_on() -> None:
    guard = Guard(CPU, max_skipped=2, spike_factor=None)
    good, bad = [torch.ones(3)], [torch.tensor([1.0, float("inf")])]
    series = enumerate((good, bad, good, bad, bad, good))
    skipped = [guard.should_skip(g, torch.tensor(step)).item() for step, g in series]
    assert skipped == [0, 1, 0, 1, 1, 1]
    assert guard.read() == SkipStats(total=4, spikes=0, in_row=3, first=3)
    other = Guard(CPU, max_skipped=2, spike_factor=None)
    other.load_state_dict(guard.state_dict())
    assert other.read() == guard.read()
    with pytest.raises(CorruptFileError, match="no usable counts"):
        other.load_state_dict({"counts": torch.zeros(3)})


def test_spikes_are_skipped_if_configured_after_a_warm_up() -> None:
    for factor, expected in ((None, 0), (10.0, 1)):
        guard = Guard(CPU, max_skipped=3, spike_factor=factor)
        early = [
            guard.should_skip([torch.tensor([n])], torch.tensor(step)).item()
            for step, n in enumerate((1.0, 50.0))
        ]
        assert early == [0, 0]
        for step in range(2, SPIKE_WARMUP):
            guard.should_skip([torch.tensor([2.0])], torch.tensor(step))
        mean = guard.norms[1].item()
        assert 1.98 < mean < 1.99  # 1, drawn a fiftieth of the way to 50, and from there towards 2
        assert guard.should_skip([torch.tensor([mean * 10.1])], torch.tensor(30)).item() == expected
        assert guard.should_skip([torch.tensor([mean * 9.9])], torch.tensor(31)).item() == 0
        assert guard.read() == SkipStats(total=expected, spikes=expected, in_row=0, first=30 if factor else 0)


def test_float16_loss_scale_has_a_floor(run: RunState) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run.parts = dataclasses.replace(run.parts, scaler=scaler)
    batch, before = first_batch(run), held(run)
    hook = fail_next(run, "gradient")
    for _ in range(2):
        train_step(run.parts, [batch], 0.01, run.step)
        run.step += 1
        check_skipped(run)
    assert scaler.get_scale() == 1.0
    train_step(run.parts, [batch], 0.01, run.step)
    hook.remove()
    with pytest.raises(DivergedError, match=r"loss scale fell to 0.5 by step 2: .*no checkpoint yet"):
        check_skipped(run)
    assert all(torch.equal(new, old) for new, old in zip(held(run), before, strict=True))


def test_weights_that_are_not_finite_are_never_saved(run: RunState) -> None:
    check_weights(run)
    run.step = 1
    save(run, None)
    run.step = 2
    weight = next(run.parts.network.parameters())
    with torch.no_grad():
        weight[0, 0, 0, 0] = 3e38  # finite, though the sum of two of them is not
        weight[0, 0, 0, 1] = 3e38
        check_weights(run)
        weight[0, 0, 0, 0] = float("nan")
    good = r"not finite at step 2, which is not saved\. The last good checkpoint is .*step-00000001\."
    with pytest.raises(DivergedError, match=good):
        save(run, None)
    assert run.folder is not None and list(saved_steps(run.folder.checkpoints)) == [1]
    assert all_finite(list(load_checkpoint(run.folder.checkpoints / "step-00000001").model_state.values()))


@pytest.mark.slow
def test_spike_on_one_rank_is_skipped_on_both(digits: Path, tmp_path: Path) -> None:
    faults = [{"kind": "spike", "rank": 1, "forward": SPIKE_WARMUP + 2}]
    sets = [f"--set={s}" for s in (*TINY, "epochs=6", f"global_batch={BATCH}", "spike_factor=20")]
    module = ["tests.helpers.faulty_rank", msgspec.json.encode(faults).decode()]
    done = run_ranks(2, [*module, f"--data={digits}", "--out=runs", *sets], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 since the run began, 1 of them spikes" in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    skipped = {row["step"]: row["samples"] for row in read_rows(run, "train") if row["skipped"]}
    assert skipped == {SPIKE_WARMUP + 3: 0}


@pytest.mark.slow
def test_too_many_skipped_in_a_row_end_the_run_with_evidence(digits: Path, tmp_path: Path) -> None:
    faults = [
        {"kind": "gradient", "rank": 1, "forward": 0},
        {"kind": "inf", "rank": 0, "forward": 2},
        *({"kind": "nan", "rank": 1, "forward": n} for n in range(4, 12)),
    ]
    settings = (
        *TINY,
        "epochs=3",
        f"global_batch={BATCH}",
        "log_every=4",
        "checkpoint_every=2",
        "max_skipped=3",
    )
    sets = [f"--set={s}" for s in settings]
    module = ["tests.helpers.faulty_rank", msgspec.json.encode(faults).decode()]
    done = run_ranks(2, [*module, f"--data={digits}", "--out=runs", *sets], cwd=tmp_path)
    assert done.returncode == 1
    (run,) = (tmp_path / "runs").iterdir()
    rows = read_rows(run, "train")
    assert [(row["skipped"], row["samples"]) for row in rows] == [(1, 25), (1, 25), (2, 0)]
    assert [row["loss"] is None for row in rows] == [False, False, True]
    said = [line for line in done.stderr.splitlines() if "skipped on all ranks" in line]
    assert len(said) == 4
    assert "2 step(s) up to step 6 skipped on all ranks, 2 in a row now (3 end the run)" in said[2]

    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "3 steps in a row, from step 5 on," in line
    assert "the weights are those of step 4" in line
    assert f"The last good checkpoint is runs/{run.name}/checkpoints/step-00000006." in line
    steps = msgspec.json.decode((run / "diverged.json").read_bytes())
    assert [(s["step"], len(s["samples"])) for s in steps] == [(5, BATCH), (6, BATCH), (7, BATCH)]
    assert steps[0]["samples"][0] in line and Path(steps[0]["samples"][0]).exists()
    # At the sixth step two had been skipped: nothing differs from the fourth.
    four, six = (load_checkpoint(run / "checkpoints" / f"step-0000000{n}") for n in (4, 6))
    assert all(torch.equal(six.model_state[name], value) for name, value in four.model_state.items())
