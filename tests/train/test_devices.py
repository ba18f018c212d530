"""Small training runs on a device: the CPU, and a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import train.setup
from data_pipeline.loading.batches import Batch
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.mix import mix_params_at
from tests.helpers.faulty_rank import fail
from tests.helpers.reference import mix_images, mix_labels
from tests.helpers.stem_samples import mix_on_device
from tests.helpers.step_samples import small_batch, small_trainer
from train.checkpoints.background import PinnedStaging
from train.checkpoints.format import Snapshot
from train.checkpoints.load import Checkpoint, load_checkpoint
from train.checkpoints.write import save_checkpoint
from train.compile.choose import compile_step
from train.distributed.hybrid import HybridParallel
from train.distributed.world import World, open_world
from train.evaluate import evaluate
from train.health.nonfinite import SkipStats
from train.inputs.mixup import mix_inputs, mixed_losses
from train.step import StepParts, train_step

pytestmark = pytest.mark.usefixtures("thin")

SMALL = ("model.hidden_units=64", "ema_decay=0.9", "model.dropout=0.0")


RATE = 0.001


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps of four small images: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with open_world(request.param) as one:
        yield one


def held(parts: StepParts) -> dict[str, Tensor]:
    """Weights, momenta and the average of the weights, copied to the CPU."""
    assert parts.ema is not None
    momenta = {f"momentum {n}": s["momentum_buffer"] for n, s in enumerate(parts.optimizer.state.values())}
    average = {f"average {name}": value for name, value in parts.ema.values.items()}
    tensors = {**parts.network.state_dict(), **momenta, **average}
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def largest_difference(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Of all numbers, against the largest of their tensor, or 0.01 where that is less: a bias is nearly 0."""
    return max(
        ((value - want[name]).abs().max() / want[name].abs().max().clamp_min(0.01)).item()
        for name, value in found.items()
        if value.is_floating_point()
    )


def losses_of(parts: StepParts, num_steps: int = 3, batches: list[Batch] | None = None) -> list[float]:
    """The losses of some steps on the same four samples."""
    found = []
    for step in range(num_steps):
        counts = train_step(parts, batches or [small_batch()], RATE, step)
        found.append(counts.reduce(parts.world).loss)
    return found


def part_of(batch: Batch, first: int, stop: int) -> Batch:
    arrays = {name: getattr(batch, name)[first:stop] for name in ("images", "labels", "valid")}
    places = batch.indices[first:stop]
    return replace(batch, **arrays, indices=places, positions=places, last=stop == len(batch))


def test_guard_and_loss_scale_skip_a_step_with_a_nan(world: World) -> None:
    on_gpu = world.device.type == "cuda"
    parts = small_trainer(world, *SMALL, f"precision={'fp16' if on_gpu else 'fp32'}")
    before, scale = held(parts), parts.scaler.get_scale()
    hook = parts.network.register_forward_hook(lambda module, images, logits_NC: fail("nan", logits_NC))
    counts = train_step(parts, [small_batch()], RATE, 0)
    hook.remove()
    assert all(torch.equal(value, before[name]) for name, value in held(parts).items())
    assert parts.guard.read() == SkipStats(total=1, spikes=0, in_row=1, first=0)
    assert counts.integers.tolist() == [0, 0, 0, 0]
    assert parts.scaler.get_scale() == (scale / 2 if on_gpu else 1.0)
    for step in range(1, 4):  # float16's first scales may overflow
        train_step(parts, [small_batch()], RATE, step)
    assert parts.guard.read().in_row == 0
    after = held(parts)
    assert not torch.equal(after["features.conv1.weight"], before["features.conv1.weight"])
    assert all(torch.isfinite(value).all() for value in after.values())


@pytest.mark.parametrize("augment", [Augment(mixup=0.8), Augment(cutmix=0.8)])
def test_mixed_images_and_losses_are_numpys(world: World, augment: Augment) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (8, 10, 10, 3), dtype=np.uint8)
    labels, logits = random.integers(0, 5, 8), random.normal(size=(8, 5)).astype(np.float32)
    plan = mix_params_at(3, 1, np.arange(8), augment, 10)
    assert plan is not None
    inputs = torch.from_numpy(images).to(world.device).permute(0, 3, 1, 2).float()
    on_device = mix_on_device(plan, world.device)
    mixed = mix_inputs(inputs, on_device).permute(0, 2, 3, 1).cpu().numpy()
    np.testing.assert_allclose(mixed, mix_images(images, plan), rtol=1e-5, atol=1e-3)
    assert np.abs(mixed - images).max() > 10
    found = mixed_losses(
        torch.from_numpy(logits).to(world.device), torch.tensor(labels).to(world.device), on_device
    )
    shares = np.exp(logits - logits.max(1, keepdims=True))
    log_probabilities = np.log(shares / shares.sum(1, keepdims=True))
    want = -(mix_labels(labels, plan, 5) * log_probabilities).sum(1)
    np.testing.assert_allclose(found.cpu().numpy(), want, rtol=1e-5, atol=1e-6)


def test_average_of_the_weights_is_its_formula(world: World) -> None:
    parts = small_trainer(world, *SMALL, "precision=fp32")
    assert parts.ema is not None
    name = "features.conv1.weight"
    want = parts.network.state_dict()[name].double().cpu()
    for step in range(4):
        train_step(parts, [small_batch()], RATE, step)
        keep = min(0.9, (1 + step) / (10 + step))
        want = keep * want + (1 - keep) * parts.network.state_dict()[name].double().cpu()
    torch.testing.assert_close(parts.ema.values[name].double().cpu(), want, rtol=1e-5, atol=1e-7)
    own = parts.network.state_dict()[name].clone()
    with parts.ema.swapped_in(parts.network):
        torch.testing.assert_close(
            parts.network.state_dict()[name].double().cpu(), want, rtol=1e-5, atol=1e-7
        )
    assert torch.equal(parts.network.state_dict()[name], own)


def test_accumulated_batches_give_the_whole_batchs_weights(world: World) -> None:
    whole, parts = (
        small_trainer(world, *SMALL, "precision=fp32", more) for more in ("seed=0", "micro_batch=2")
    )
    halves = [part_of(small_batch(), 0, 2), part_of(small_batch(), 2, 4)]
    for num_steps in (1, 2):
        want = losses_of(whole, num_steps)
        assert losses_of(parts, num_steps, halves) == pytest.approx(want, rel=1e-5)
        # later, rounding decides here and there which of two pixels a pooling takes
        assert num_steps > 1 or largest_difference(held(parts), held(whole)) < 1e-3


def test_hybrid_parallelism_on_one_rank_trains_as_ddp(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    want = losses_of(small_trainer(world, *SMALL, "precision=fp32"))

    def split(network: Any, config: Any, world: World) -> HybridParallel:
        return HybridParallel(network, world, [4])

    monkeypatch.setattr(train.setup, "make_parallel", split)  # one rank alone would take DDP
    parts = small_trainer(world, *SMALL, "precision=fp32")
    assert isinstance(parts.parallel, HybridParallel)
    assert losses_of(parts) == pytest.approx(want, rel=1e-5)
    assert want[-1] < want[0]


def test_evaluation_counts_what_the_cpu_counts(world: World) -> None:
    parts = small_trainer(world, *SMALL, "precision=fp32")
    random = np.random.default_rng(1)
    images, places = random.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8), np.arange(40)
    labels, valid = random.integers(0, 10, 40), places % 13 != 5
    batches = [
        Batch(images[p], labels[p], valid[p], p, p, (), (), step=n, last=True)
        for n, p in enumerate((places[:32], places[32:]))
    ]
    found = evaluate(parts.network, parts.normalize, batches, parts.precision, world, num_samples=40)
    network, normalize = parts.network.cpu(), parts.normalize.cpu()
    with torch.no_grad():
        logits = network.eval()(normalize(torch.from_numpy(images))).double()
    ranks = (logits > logits.gather(1, torch.from_numpy(labels)[:, None])).sum(1).numpy()[valid]
    assert (found.num_samples, found.num_failed) == (37, 3)
    assert found.top1 == pytest.approx((ranks < 1).sum() / 37) and 0 < found.top5 < 1
    assert found.top5 == pytest.approx((ranks < 5).sum() / 37)
    losses = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="none").numpy()
    assert found.loss == pytest.approx(losses[valid].mean(), rel=1e-4)


def saved(parts: StepParts, folder: Path) -> Checkpoint:
    """A checkpoint of these parts, written and read."""
    assert parts.ema is not None
    states: dict[str, Any] = {
        "model": parts.network.state_dict(), "average": parts.ema.values,
        "optimizer": parts.optimizer.state_dict(), "scaler": parts.scaler.state_dict(),
        "guard": parts.guard.state_dict(),
    }  # fmt: skip
    snapshot = Snapshot(
        step=1, epoch=0, samples_seen=4, config=parts.config, classes=tuple("abcdefghij"), metrics={},
        states=PinnedStaging().copy(states),
    )  # fmt: skip
    return load_checkpoint(save_checkpoint(folder, snapshot))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_checkpoint_goes_to_the_cpu_and_back(device: Literal["cpu", "cuda"], tmp_path: Path) -> None:
    how = (*SMALL, "precision=fp32")
    with open_world(device) as world:
        first = small_trainer(world, *how)
        losses_of(first, 1)
        there, begun = saved(first, tmp_path / "there"), held(first)
        want = losses_of(first, 2)
    with open_world("cpu") as world:
        second = small_trainer(world, *how, checkpoint=there)
        assert all(torch.equal(value, begun[name]) for name, value in held(second).items())
        back = saved(second, tmp_path / "back")
        assert losses_of(second, 2) == pytest.approx(want, rel=1e-4)
    with open_world(device) as world:
        third = small_trainer(world, *how, checkpoint=back)
        assert all(torch.equal(value, begun[name]) for name, value in held(third).items())
        assert {tensor.device.type for tensor in third.network.state_dict().values()} == {device}
        assert losses_of(third, 2) == pytest.approx(want, rel=1e-5)


@pytest.mark.gpu  # on a CPU it takes half a minute: tests/train/compile
def test_compiled_step_has_the_plain_steps_losses() -> None:
    with open_world("cuda") as world:
        plain, parts = (small_trainer(world, *SMALL, "precision=fp32") for _ in range(2))
        compile_step(parts.network)
        assert losses_of(parts) == pytest.approx(losses_of(plain), rel=1e-3)
        assert largest_difference(held(parts), held(plain)) < 1e-2
