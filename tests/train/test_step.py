"""One optimiser step: it never waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.step_samples import small_batch, small_trainer
from train.distributed.world import World, open_world
from train.health.metrics import AccuracyMeter
from train.step import train_step

pytestmark = pytest.mark.slow


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


LARS = ("optimizer.name=lars", "optimizer.momentum_form=paper", "ema_decay=0.9", "label_smoothing=0.1")


@pytest.mark.parametrize("more", [("precision=fp32",), ("precision=bf16", "model.norm_batch=2"), LARS])
def test_train_step_never_waits_for_the_device(world: World, more: tuple[str, ...]) -> None:
    parts = small_trainer(world, *more, "spike_factor=20", "model.name=bn", "micro_batch=4")
    total = AccuracyMeter(world.device)
    with WaitsForDevice() as waits:
        for step in range(2):
            total.merge(train_step(parts, [small_batch(last=False), small_batch()], 0.01, step))
        assert waits.seen == []
        metrics = total.reduce(world)  # where a row is written
        assert "_local_scalar_dense" in waits.seen
    assert metrics.num_samples == 16
