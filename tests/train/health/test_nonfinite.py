"""Bad gradients never reach the weights: skipped, counted, shown, and in the end the end of the run."""

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
from data_pipeline.loading.prefetch import Batch
from tests.helpers.faulty_rank import fail
from tests.helpers.ranks import TINY, link_subset, read_rows
from tests.helpers.warm_ranks import run_ranks
from train.checkpoints.load import load_checkpoint
from train.checkpoints.retention import saved_steps
from train.config.load import make_config
from train.distributed.world import open_world
from train.health.nonfinite import SPIKE_WARMUP, Guard, SkipStats, all_finite, propagate_nonfinite
from train.loop import save
from train.runs.abort import check_skipped_steps, check_weights
from train.setup import RunState, build_run
from train.step import train_step

CPU = torch.device("cpu")
BATCH = 25


@pytest.fixture(scope="module")
def digits(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_subset(demo_data, tmp_path_factory.mktemp("guard") / "data", num_train=100, num_val=10)


@pytest.fixture
def session(digits: Path, tmp_path: Path) -> Iterator[RunState]:
    """A run of one rank, about to begin, of the network with running statistics, and an average of both."""
    sets = [
        *TINY,
        "model.name=bn",
        "ema_decay=0.9",
        f"global_batch={BATCH}",
        "epochs=1",
        "keep_checkpoints=1",
    ]
    with ExitStack() as stack:
        world = stack.enter_context(open_world("cpu"))
        yield build_run(make_config("demo", sets, digits), tmp_path, "none", world, stack)


def first_batch(session: RunState) -> Batch:
    batches = session.loader.train(
        session.train_set, session.config.augment, seed=0, global_batch=BATCH, num_steps=1
    )
    with closing(batches):
        return next(batches)


def fail_next(session: RunState, kind: str) -> Any:
    """Make the network's next forward passes fail; `remove()` the hook that is returned."""

    def hook(module: object, images: object, logits_NC: Tensor) -> Tensor:
        return fail(kind, logits_NC)

    return session.trainer.network.register_forward_hook(hook)


def held(session: RunState) -> list[Tensor]:
    """Weights, running statistics, momenta and the average of the weights, copied."""
    trainer = session.trainer
    assert trainer.average is not None
    momenta = [s["momentum_buffer"] for s in trainer.optimizer.state.values()]
    averages = trainer.average.values.values()
    return [t.clone() for t in (*trainer.network.state_dict().values(), *momenta, *averages)]


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_a_bad_step_changes_nothing_not_even_as_the_first(session: RunState, kind: str) -> None:
    batch, before = first_batch(session), held(session)
    hook = fail_next(session, kind)
    counts = train_step(session.trainer, [batch], 0.01, 0)
    hook.remove()
    assert all(torch.equal(new, old) for new, old in zip(held(session), before, strict=True))
    assert session.trainer.guard.read() == SkipStats(total=1, spikes=0, in_row=1, first=0)
    assert (counts.integers.tolist(), counts.loss_sum.item()) == ([0, 0, 0, 0], 0.0)
    counts = train_step(session.trainer, [batch], 0.01, 1)
    assert session.trainer.guard.read() == SkipStats(total=1, spikes=0, in_row=0, first=0)
    assert counts.integers[0].item() == BATCH
    after = held(session)
    assert not all(torch.equal(new, old) for new, old in zip(after, before, strict=True))
    assert all_finite(after)


def test_an_infinite_loss_poisons_and_a_finite_one_keeps_its_bits() -> None:
    for value in (1.7, float("inf"), float("nan")):
        loss = torch.tensor(value, requires_grad=True)
        torch.autograd.backward(propagate_nonfinite(loss))
        assert loss.grad is not None
        assert torch.equal(propagate_nonfinite(loss), loss) is (loss.grad.item() == 1.0) is (value == 1.7)


def test_the_row_of_skipped_steps_freezes_the_guard_at_its_limit() -> None:
    guard = Guard(CPU, max_skipped=2, spike_factor=None)
    good, bad = [torch.ones(3)], [torch.tensor([1.0, float("inf")])]
    said = [guard.should_skip(g, step).item() for step, g in enumerate((good, bad, good, bad, bad, good))]
    assert said == [0, 1, 0, 1, 1, 1]
    assert guard.read() == SkipStats(total=4, spikes=0, in_row=3, first=3)
    other = Guard(CPU, max_skipped=2, spike_factor=None)
    other.load_state_dict(guard.state_dict())
    assert other.read() == guard.read()
    with pytest.raises(CorruptFileError, match="no usable counts"):
        other.load_state_dict({"counts": torch.zeros(3)})


def test_spikes_are_skipped_only_when_asked_and_once_the_mean_is_known() -> None:
    for factor, expected in ((None, 0), (10.0, 1)):
        guard = Guard(CPU, max_skipped=3, spike_factor=factor)
        early = [guard.should_skip([torch.tensor([n])], step).item() for step, n in enumerate((1.0, 50.0))]
        assert early == [0, 0]
        for step in range(2, SPIKE_WARMUP):
            guard.should_skip([torch.tensor([2.0])], step)
        mean = guard.norms[1].item()
        assert 1.98 < mean < 1.99  # 1, drawn a fiftieth of the way to 50, and from there towards 2
        assert guard.should_skip([torch.tensor([mean * 10.1])], 30).item() == expected
        assert guard.should_skip([torch.tensor([mean * 9.9])], 31).item() == 0
        assert guard.read() == SkipStats(total=expected, spikes=expected, in_row=0, first=30 if factor else 0)


def test_float16s_loss_scale_has_a_floor(session: RunState) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    session.trainer = dataclasses.replace(session.trainer, scaler=scaler)
    batch, before = first_batch(session), held(session)
    hook = fail_next(session, "gradient")
    for _ in range(2):
        train_step(session.trainer, [batch], 0.01, session.step)
        session.step += 1
        check_skipped_steps(session)
    assert scaler.get_scale() == 1.0
    train_step(session.trainer, [batch], 0.01, session.step)
    hook.remove()
    with pytest.raises(DivergedError, match=r"loss scale fell to 0.5 by step 2: .*no checkpoint yet"):
        check_skipped_steps(session)
    assert all(torch.equal(new, old) for new, old in zip(held(session), before, strict=True))


def test_weights_that_are_not_finite_are_never_saved_and_push_no_good_ones_out(session: RunState) -> None:
    check_weights(session)
    session.step = 1
    save(session, None)
    session.step = 2
    weight = next(session.trainer.network.parameters())
    with torch.no_grad():
        weight[0, 0, 0, 0] = 3e38  # finite, though the sum of two of them is not
        weight[0, 0, 0, 1] = 3e38
        check_weights(session)
        weight[0, 0, 0, 0] = float("nan")
    good = r"not finite at step 2, which is not saved\. The last good checkpoint is .*step-00000001\."
    with pytest.raises(DivergedError, match=good):
        save(session, None)
    assert session.folder is not None and list(saved_steps(session.folder.checkpoints)) == [1]
    assert all_finite(
        list(load_checkpoint(session.folder.checkpoints / "step-00000001").model_state.values())
    )


def test_a_spike_on_one_rank_is_skipped_on_both(digits: Path, tmp_path: Path) -> None:
    faults = [{"kind": "spike", "rank": 1, "forward": SPIKE_WARMUP + 2}]
    sets = [f"--set={s}" for s in (*TINY, "epochs=6", f"global_batch={BATCH}", "spike_factor=20")]
    module = ["tests.helpers.faulty_rank", msgspec.json.encode(faults).decode()]
    done = run_ranks(2, [*module, f"--data={digits}", "--out=runs", *sets], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 since the run began, 1 of them spikes" in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    skipped = {row["step"]: row["samples"] for row in read_rows(run, "train") if row["skipped"]}
    assert skipped == {SPIKE_WARMUP + 3: 0}


def test_ranks_skip_alike_and_too_many_in_a_row_end_the_run_with_the_samples_named(
    digits: Path, tmp_path: Path
) -> None:
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
