"""One optimiser step: it never waits for the device, and augments in torchvision's order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.erase import erase_boxes_at
from data_pipeline.transforms.mix import mix_params_at
from data_pipeline.transforms.trivial import trivial_params_at
from tests.helpers.reference import erase_images, mix_images, trivial_images
from tests.helpers.step_samples import small_batch, small_trainer
from train.distributed.world import World, open_world
from train.health.metrics import AccuracyMeter
from train.inputs.pass_inputs import make_inputs
from train.models.dropout import masks_of
from train.step import train_step, training_inputs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thin")]


class WaitsForDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operator that hands a tensor's values to Python."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1].split(".")[0]
        if name in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def world() -> Iterator[World]:
    with open_world("cpu") as one:
        yield one


AUGMENT = Augment(trivial=True, erase=0.9, mixup=0.4, cutmix=1.0)
AUGMENTED: dict[str, Any] = {
    "trivial": trivial_params_at(1, 0, np.arange(4), AUGMENT),
    "erase": erase_boxes_at(1, 0, np.arange(4), AUGMENT, 32),
    "mix": mix_params_at(1, 0, np.arange(4), AUGMENT, 32),
}

LARS = ("optimizer.name=lars", "optimizer.momentum_form=paper", "ema_decay=0.9", "label_smoothing=0.1")


@pytest.mark.parametrize("more", [("precision=fp32",), ("precision=bf16", "model.norm_batch=2"), LARS])
def test_train_step_never_waits_for_the_device(world: World, more: tuple[str, ...]) -> None:
    parts = small_trainer(world, *more, "spike_factor=20", "model.name=bn", "micro_batch=4")
    batches = [small_batch(last=False), small_batch(**AUGMENTED)]
    total = AccuracyMeter(world.device)
    with WaitsForDevice() as waits:
        for step in range(2):
            total.merge(train_step(parts, batches, 0.01, step))
        assert waits.seen == []
        metrics = total.reduce(world)  # where a row is written
        assert "_local_scalar_dense" in waits.seen
    assert metrics.num_samples == 16


def test_dropout_masks_are_those_of_positions_in_any_passes(world: World) -> None:
    """A step in one pass and in two, with the samples in another order; torch's generator is not asked."""
    found: list[tuple[float, Tensor]] = []
    for parts_of in ([[0, 1, 2, 3]], [[2, 0, 3], [1]], [[0, 1, 2, 3]]):
        parts = small_trainer(world, "precision=fp32", "model.dropout=0.5", "micro_batch=4")
        batch = small_batch()
        generator = torch.get_rng_state()  # the weights are drawn from it
        batches = [
            replace(
                batch, images=batch.images[places], labels=batch.labels[places], valid=batch.valid[places],
                indices=batch.indices[places], positions=batch.positions[places], last=places == parts_of[-1],
            )
            for places in parts_of
        ]  # fmt: skip
        step = 5 if len(found) < 2 else 6
        loss = train_step(parts, batches, 0.0, step).reduce(world).loss
        assert masks_of(parts.network).rows_N is None
        assert torch.equal(torch.get_rng_state(), generator)
        *_, weight, _bias = parts.network.parameters()
        assert weight.grad is not None
        found.append((loss, weight.grad.clone()))
    (whole, gradient), (split, split_gradient), (later, _) = found
    assert split == pytest.approx(whole, rel=1e-6) and later != pytest.approx(whole, rel=1e-3)
    torch.testing.assert_close(split_gradient, gradient, rtol=1e-4, atol=1e-5)


def test_class_weights_scale_loss_and_gradient_of_a_step(world: World) -> None:
    """The sum is divided by the global batch, whatever the weights are."""
    plain = small_trainer(world, "precision=fp32", "model.dropout=0", "label_smoothing=0.1")
    found = []
    for parts in (plain, replace(plain, class_weights=torch.full((10,), 3.0))):
        metrics = train_step(parts, [small_batch(**AUGMENTED)], 0.0, 0).reduce(world)
        *_, bias = parts.network.parameters()
        assert bias.grad is not None
        found.append((metrics.loss, bias.grad.clone()))
    (loss, gradient), (weighted_loss, weighted_gradient) = found
    assert weighted_loss == pytest.approx(3 * loss, rel=1e-5)
    torch.testing.assert_close(weighted_gradient, 3 * gradient)


def test_inputs_are_augmented_in_torchvisions_order(world: World) -> None:
    """TrivialAugment, then the normalisation, erasing and mixing, as NumPy and Pillow compute them."""
    parts, batch = small_trainer(world), small_batch(**AUGMENTED)
    assert batch.trivial is not None and batch.erase is not None and batch.mix is not None
    assert len(set(batch.trivial.operations)) > 2
    assert batch.erase.any() and (batch.mix.label_weights < 1).any()
    inputs_NCHW = training_inputs(make_inputs(batch, world.device), parts.normalize)
    preprocessing = parts.config.preprocessing
    mean, std = (np.array(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    normalized = (trivial_images(batch.images, batch.trivial).astype(np.float32) / 255 - mean) / std
    expected = mix_images(erase_images(normalized, batch.erase), batch.mix)
    assert np.abs(inputs_NCHW.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-5
    plain = make_inputs(small_batch(), world.device)
    assert (training_inputs(plain, parts.normalize) == parts.normalize(plain.images)).all()
