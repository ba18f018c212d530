"""The ranks of `tests.train.distributed.test_hybrid`: torchrun … -m tests.helpers.hybrid_ranks [cuda].

Rank 0 prints one JSON object of all ranks' results; the test checks it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.loading.batches import Batch
from data_pipeline.transforms.sampler import rank_slice
from tests.helpers.dropout_reference import kept_units
from tests.helpers.faulty_rank import fail
from tests.helpers.norm_ranks import compare_norms
from tests.helpers.ranks import TINY
from tests.helpers.step_samples import parts_of
from train.config.load import make_config
from train.distributed.hybrid import (
    HybridParallel,
    gather_tensors,
    map_optimizer_state,
    shard_tensors,
)
from train.distributed.tensor_parallel import shard_bounds
from train.distributed.world import World, open_world
from train.models.alexnet import AlexNet
from train.optim.sgd import load_optimizer
from train.step import StepParts, train_step

GLOBAL_BATCH = 25
CLASSES = tuple("0123456789")
RATE = 0.0003
CROP_PX = 32
SIZE = (f"preprocessing.resize_px={CROP_PX}", f"preprocessing.crop_px={CROP_PX}", "model.hidden_units=1024")
NUM_STEPS = 2


def make(world: World, *overrides: str) -> StepParts:
    """The parts of a step as a run would make them."""
    sets = [*TINY, *SIZE, "model.dropout=0.5", f"global_batch={GLOBAL_BATCH}", "micro_batch=4", *overrides]
    return parts_of(make_config("demo", sets), world, classes=CLASSES)


def batches_at(world: World, step: int, micro_batch: int = 4) -> list[Batch]:
    """This rank's micro-batches of noise; all ranks together have the same samples on any number of ranks."""
    random = np.random.default_rng(step)
    images = random.integers(0, 256, (GLOBAL_BATCH, CROP_PX, CROP_PX, 3), dtype=np.uint8)
    labels = random.integers(0, len(CLASSES), GLOBAL_BATCH)
    share = rank_slice(GLOBAL_BATCH, world.rank, world.world_size)
    made = []
    for start in range(share.start, share.stop, micro_batch):
        places = np.arange(start, min(start + micro_batch, share.stop))
        valid = places != 7  # one that could not be read
        last = bool(places[-1] == share.stop - 1)
        made.append(Batch(images[places], labels[places], valid, places, places, (), (), step, last))
    return made


def linear_layers(network: nn.Module) -> list[nn.Linear]:
    """The fully connected layers, in order."""
    return [m for m in network.modules() if isinstance(m, nn.Linear)]


def train(parts: StepParts) -> list[float]:
    """The losses of some steps."""
    losses = []
    for step in range(NUM_STEPS):
        counts = train_step(parts, batches_at(parts.world, step), RATE, step)
        losses.append(counts.reduce(parts.world).loss)
    return losses


def loads_again(parts: StepParts) -> bool:
    """Return whether this rank gets its own momenta back from the gathered ones."""
    parallel, optimizer = parts.parallel, parts.optimizer
    before = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    whole = copy.deepcopy(map_optimizer_state(parallel, optimizer, optimizer.state_dict(), gather_tensors))
    for state in optimizer.state.values():
        state["momentum_buffer"].zero_()
    load_optimizer(optimizer, map_optimizer_state(parallel, optimizer, whole, shard_tensors))
    after = [state["momentum_buffer"] for state in optimizer.state.values()]
    return all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def compare(world: World, *overrides: str) -> dict[str, Any]:
    """Losses, norm, weights, average and momenta after some steps, of plain DDP and of hybrid parallelism."""
    found: dict[str, Any] = {}
    states = []
    for mode in ("ddp", "hybrid"):
        parts = make(world, f"parallel={mode}", *overrides)
        losses = train(parts)
        assert parts.ema is not None
        tensors = gather_tensors(parts.parallel, parts.network.state_dict())
        average = gather_tensors(parts.parallel, parts.ema.values)
        momenta = map_optimizer_state(
            parts.parallel, parts.optimizer, parts.optimizer.state_dict(), gather_tensors
        )["state"]
        states.append(
            {f"weight {name}": tensor.clone() for name, tensor in tensors.items()}
            | {f"average {name}": tensor.clone() for name, tensor in average.items()}
            | {f"momentum {n}": value["momentum_buffer"].clone() for n, value in momenta.items()}
        )
        assert loads_again(parts)
        held = sum(p.numel() for p in parts.network.parameters())
        found[mode] = {"losses": losses, "norm": parts.guard.norms[1].item(), "parameters": held}
    one, other = states
    assert one.keys() == other.keys()
    found["shapes"] = all(one[name].shape == other[name].shape for name in one)
    # Against the largest number of each tensor, or 0.01: rounding is as large for a bias that is nearly 0.
    worst = {
        n: ((one[n] - other[n]).abs().max() / one[n].abs().max().clamp_min(0.01)).item()
        for n in one
        if one[n].is_floating_point()
    }
    found["worst"] = {
        kind: max(value for n, value in worst.items() if n.startswith(kind))
        for kind in ("weight", "average", "momentum")
    }
    return found


def pad_rows(world: World, rank: int) -> np.ndarray:
    """The positions that a rank brings to a pass with its whole share, 0 for what pads it."""
    shares = [rank_slice(GLOBAL_BATCH, other, world.world_size) for other in range(world.world_size)]
    rows = np.zeros(max(share.stop - share.start for share in shares), np.int64)
    rows[: shares[rank].stop - shares[rank].start] = np.arange(shares[rank].start, shares[rank].stop)
    return rows


def set_activations_to_one(network: AlexNet) -> list[nn.Linear]:
    """Make activations before dropout 1, and weights behind the second one. Returns the linear layers."""
    last_conv = [m for m in network.features.modules() if isinstance(m, nn.Conv2d)][-1]
    layers = linear_layers(network)
    with torch.no_grad():
        for layer, weight, bias in ((last_conv, 0.0, 1.0), (layers[0], 0.0, 1.0), (layers[1], 1.0, 0.0)):
            layer.weight.fill_(weight)
            assert layer.bias is not None
            layer.bias.fill_(bias)
    return layers


def masks(world: World) -> dict[str, Any]:
    """Make dropout masks visible: activations before it are 1, and weights behind it are 1."""
    sets = ("parallel=hybrid", "model.name=owt", "model.hidden_units=4096", f"micro_batch={GLOBAL_BATCH}")
    parts = make(world, *sets)
    network = parts.network
    layers = set_activations_to_one(network)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            seen[name] = inputs[0].detach().clone()
            seen[name + " out"] = output.detach().clone()

        return hook

    layers[0].register_forward_hook(keep("features"))
    layers[1].register_forward_hook(keep("units"))
    runs = []
    for step in (0, 0, 1):
        share = rank_slice(GLOBAL_BATCH, world.rank, world.world_size)
        places = np.arange(share.start, share.stop)
        images = np.zeros((len(places), CROP_PX, CROP_PX, 3), np.uint8)
        batch = Batch(images, places % 10, places >= 0, places, places, (), (), step, True)
        train_step(parts, [batch], 0.0, step)
        runs.append(dict(seen))
    first, again, next_ = runs
    # Whose are the units of the next layer: each is the sum of all ranks' masked units.
    rows = first["units"].shape[0]
    sums: Tensor = first["units"].sum(1)
    dist.all_reduce(sums)
    everyones = [torch.empty(rows, 1000, device=world.device) for _ in range(world.world_size)]
    dist.all_gather(everyones, first["units"][:, :1000].contiguous())
    with torch.no_grad():
        layers[0].weight.fill_(1.0)
    train_step(parts, [batch], 0.0, 0)
    summed = seen["features out"][:, 0] - 1  # of the features of every sample of every rank, here
    elsewhere = summed.clone()
    dist.broadcast(elsewhere, src=0)
    units = range(*shard_bounds(layers[0].out_features, world.rank, world.world_size))
    padded = np.concatenate([pad_rows(world, rank) for rank in range(world.world_size)])
    seed = parts.config.seed
    expected_features = kept_units(seed, 0, 0, places, range(first["features"].shape[1]), 0.5)
    expected_units = kept_units(seed, 0, 1, padded, units, 0.5)
    own_rows = summed.view(world.world_size, -1)[world.rank][: len(places)]
    everyone = [(everyones[0] == other).float().mean().item() for other in everyones[1:]]
    return {
        "values": sorted(torch.unique(first["units"]).tolist()),
        "kept units": (first["units"] > 0).float().mean().item(),
        "kept features": (first["features"] > 0).float().mean().item(),
        "features of the recipe": bool(((first["features"] > 0).cpu().numpy() == expected_features).all()),
        "units of the recipe": bool(((first["units"] > 0).cpu().numpy() == expected_units).all()),
        "same again": torch.equal(first["units"], again["units"]),
        "same in next step": (first["units"] == next_["units"]).float().mean().item(),
        "same on other slices": everyone,
        "same for next sample": (first["units"][1:] == first["units"][:-1]).float().mean().item(),
        "units gathered as masked": bool((first["units out"] == sums[:, None]).all()),
        "features alike on all ranks": torch.equal(summed, elsewhere),
        "features gathered as masked": torch.allclose(own_rows, seen["features"].sum(1)),
    }


def overflow(world: World) -> dict[str, Any]:
    """A gradient that overflows in one rank's shard alone, and a loss that is NaN on one rank alone."""
    parts = make(world, "parallel=hybrid", "model.dropout=0.0")  # its loss begins near ln(10)
    parts = dataclasses.replace(parts, scaler=torch.amp.GradScaler(world.device.type, init_scale=1024.0))
    assert isinstance(parts.parallel, HybridParallel)
    before = [p.detach().clone() for p in parts.network.parameters()]
    layer = linear_layers(parts.network)[0]
    handles = [layer.weight.register_hook(lambda g: g * float("inf"))] if world.rank == 1 else []  # type: ignore[no-untyped-call]
    train_step(parts, batches_at(world, 0), RATE, 0)
    scale, skips = parts.scaler.get_scale(), parts.guard.read().total
    for handle in handles:
        handle.remove()
    kinds = ("nan", "inf", "gradient")
    for number, kind in enumerate(kinds):
        hook = parts.parallel.register_forward_hook(
            lambda _m, _i, logits, number=number, kind=kind: (
                fail(kind, logits) if world.rank == number % world.world_size else logits
            )
        )
        train_step(parts, batches_at(world, 0), RATE, 1 + number)
        hook.remove()
    kept = all(torch.equal(p, old) for p, old in zip(parts.network.parameters(), before, strict=True))
    counts = train_step(parts, batches_at(world, 0), RATE, 4)
    loss = counts.reduce(world).loss
    return {
        "scale": scale,
        "skips": [skips, parts.guard.read().total],
        "unchanged": kept,
        "loss afterwards": loss,
        "scale afterwards": parts.scaler.get_scale(),
    }


def main() -> None:
    """Run all cases, and let rank 0 print."""
    torch.set_num_threads(1)
    with open_world("cuda" if "cuda" in sys.argv else "cpu") as world:
        average = "ema_decay=0.5"
        found: dict[str, Any] = {
            "bn": compare(world, average, "model.name=bn"),
            "owt in bf16": compare(world, average, "model.name=owt", "precision=bf16"),
            "masks": masks(world),
            "overflow": overflow(world),
            "norms": compare_norms(world),
        }
        everyones = world.gather_objects(found)
        if world.is_main:
            click.echo(json.dumps(everyones))


if __name__ == "__main__":
    main()
