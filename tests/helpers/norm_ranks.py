"""Steps with batch normalisation on several ranks and on one, for `ddp_ranks` and `hybrid_ranks`.

The one rank is a second trainer in each of the processes, with all samples: DDP averages equal gradients.
Networks compute in float64. In float32 rounding decides here and there a ReLU or a maximum, and on maps as
small as these ones that alone is a thousandth of the gradient.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.loading.batches import Batch
from data_pipeline.transforms.sampler import rank_slice
from tests.helpers.ranks import TINY
from tests.helpers.step_samples import parts_of
from train.config.load import make_config
from train.distributed.hybrid import samples_of_passes
from train.distributed.world import World
from train.models.alexnet import Normalize
from train.step import StepParts, train_step

CROP_PX = 12
NUM_STEPS = 3
RATE = 0.0003
NORMED = (
    *TINY, f"preprocessing.crop_px={CROP_PX}", f"preprocessing.resize_px={CROP_PX}", "model.stem_kernel=5",
    "model.groups=1", "model.norm=bn_after_relu", "model.pool_padding=1", "model.hidden_units=16",
    "model.hidden_norm=true", "ema_decay=0.5",
)  # fmt: skip


def make_parts(world: World, *overrides: str) -> StepParts:
    """The parts of a step as a run would make them."""
    parts = parts_of(make_config("demo", [*NORMED, *overrides]), world)
    return replace(parts, normalize=InFloat64(parts.config.preprocessing))


class InFloat64(Normalize):
    """Normalised images for a network in float64."""

    def forward(self, images_NHWC: Tensor) -> Tensor:
        return super().forward(images_NHWC).double()


def batch_of(places: list[int], step: int, global_batch: int) -> Batch:
    """Some samples of a step, which are noise; the one at place 7 could not be read."""
    random, chosen = np.random.default_rng(step), np.array(places)
    images = random.integers(0, 256, (global_batch, CROP_PX, CROP_PX, 3), dtype=np.uint8)
    images[7] = 0
    labels = random.integers(0, 10, global_batch)
    return Batch(images[chosen], labels[chosen], chosen != 7, chosen, chosen, (), (), step, True)


def passes_of(global_batch: int, world_size: int, micro_batch: int) -> list[list[list[int]]]:
    """Which places of a batch each rank takes in each pass; none in passes that it joins without samples."""
    by_rank = []
    for rank, sizes in enumerate(samples_of_passes(global_batch, world_size, micro_batch)):
        first = rank_slice(global_batch, rank, world_size).start
        starts = np.cumsum([first, *sizes])
        by_rank.append([list(range(start, start + size)) for start, size in zip(starts, sizes, strict=False)])
    return by_rank


def compare(
    world: World, global_batch: int, micro_batch: int, *overrides: str, whole: bool
) -> dict[str, Any]:
    """Losses of several ranks and of one, and the largest relative difference of a tensor of their states.

    Args:
        whole: whether the one rank takes its batch at once, whatever the ranks' passes; else in the same
            passes, each with the samples of all ranks.
    """
    by_rank = passes_of(global_batch, world.world_size, micro_batch)
    joined = [list(chain(*places)) for places in zip(*by_rank, strict=True)]
    batch = f"global_batch={global_batch}"
    many = make_parts(world, batch, f"micro_batch={micro_batch}", *overrides)
    alone = replace(world, rank=0, world_size=1)
    one = make_parts(alone, batch, f"micro_batch={global_batch}", *overrides)
    losses: dict[str, list[float]] = {"many": [], "one": []}
    for step in range(NUM_STEPS):
        for name, parts, passes in (
            ("many", many, by_rank[world.rank]),
            ("one", one, [list(range(global_batch))] if whole else joined),
        ):
            batches = [batch_of(places, step, global_batch) for places in passes if places]
            losses[name].append(train_step(parts, batches, RATE, step).reduce(world).loss)
    assert many.ema is not None and one.ema is not None
    worst = 0.0
    for ours, theirs in (
        (many.network.state_dict(), one.network.state_dict()), (many.ema.values, one.ema.values)
    ):  # fmt: skip
        for name, tensor in ours.items():
            difference = (tensor - theirs[name]).double().norm() / theirs[name].double().norm().clamp_min(0.1)
            worst = max(worst, float(difference))
    statistics = torch.cat(
        [b.flatten().double() for b in (*many.network.buffers(), *many.ema.values.values())]
    )
    alike = all(torch.equal(statistics, other) for other in world.all_gather(statistics))
    counted = int(many.network.state_dict()["features.norm1.num_batches_tracked"])
    return {**losses, "worst": worst, "alike": alike, "counted": counted}


def compare_norms(world: World) -> dict[str, Any]:
    """All cases: over ranks with shares of another size, in passes that not all have, and ghost batches.

    These of 4 samples magnify rounding most: dropout is off there.
    """
    torch.set_default_dtype(torch.float64)
    try:
        return {
            "over ranks": compare(world, 25, 25, "model.dropout=0.5", whole=True),
            "in passes": compare(world, 25, 8, "model.dropout=0.5", whole=False),
            "ghosts": compare(world, 24, 4, "model.norm_batch=4", whole=True),
        }
    finally:
        torch.set_default_dtype(torch.float32)


def check_norms(found: list[dict[str, Any]]) -> None:
    """Check the results of `compare_norms` on each rank."""
    for rank in found:
        for case, result in rank["norms"].items():
            assert result["many"] == pytest.approx(result["one"], rel=1e-6), case
            assert len(set(result["one"])) == NUM_STEPS and result["alike"], case
            assert result["worst"] < 1e-6, case
        # the running statistics move with each pass of all ranks, with ghost batches once a step
        counted = {case: result["counted"] for case, result in rank["norms"].items()}
        assert counted == {"over ranks": NUM_STEPS, "in passes": 2 * NUM_STEPS, "ghosts": NUM_STEPS}
