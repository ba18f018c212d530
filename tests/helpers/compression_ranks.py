"""The ranks of `tests.train.distributed.test_compression`: torchrun … -m tests.helpers.compression_ranks.

Rank 0 prints one JSON object of what was found; the test judges it.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import Tensor

from tests.helpers.faulty_rank import fail
from tests.helpers.hybrid_ranks import GLOBAL_BATCH, RATE, batches_at, linear_layers, make
from train.bench.traffic import sent_bytes
from train.distributed.world import World, open_world
from train.step import StepParts, train_step

NUM_COMPRESSED = 6
POWERSGD = ("compress=powersgd", "powersgd_start=2")


def unshard(world: World, *overrides: str) -> StepParts:
    """A trainer that takes its share of a batch at once."""
    return make(world, f"micro_batch={GLOBAL_BATCH}", "model.hidden_units=1024", *overrides)


def gradient_of(trainer: StepParts, step: int) -> Tensor:
    """The gradient of a step that leaves the weights as they are, flat."""
    train_step(trainer, batches_at(trainer.world, 0, GLOBAL_BATCH), 0.0, step)
    return torch.cat([p.grad.flatten().clone() for p in trainer.network.parameters() if p.grad is not None])


def traffic(world: World, *overrides: str) -> dict[str, int]:
    """Bytes that this rank sends in a step, once everything has settled, and what a formula needs."""
    trainer = unshard(world, *overrides)
    for step in range(3):
        before = sent_bytes()
        gradient_of(trainer, step)
        world.barrier()
    in_fc = sum(p.numel() for layer in linear_layers(trainer.network) for p in layer.parameters())
    return {
        "sent": sent_bytes() - before,
        "convolutions": sum(p.numel() for p in trainer.network.parameters()) - in_fc,
        "fully connected": in_fc,
        "features": linear_layers(trainer.network)[0].in_features,
        "hidden": linear_layers(trainer.network)[-1].in_features,
    }


def distances(world: World) -> dict[str, Any]:
    """How far compressed gradients are from the plain one, relative to its length."""
    plain = gradient_of(unshard(world), 0)

    def distance(gradient: Tensor) -> float:
        return float((gradient - plain).norm() / plain.norm())

    rounded = gradient_of(unshard(world, "compress=bf16"), 0)
    trainer = unshard(world, *POWERSGD)
    first = [distance(gradient_of(trainer, step)) for step in range(2)]
    total, means, alone = torch.zeros_like(plain), [], []
    for number in range(1, NUM_COMPRESSED + 1):
        gradient = gradient_of(trainer, 1 + number)
        total += gradient
        alone.append(distance(gradient))
        means.append(distance(total / number))
    everyones = [torch.empty_like(gradient) for _ in range(world.world_size)]
    dist.all_gather(everyones, gradient)
    return {
        "bf16": distance(rounded),
        "plain steps": first,
        "powersgd": alone,
        "mean of powersgd": means,
        "alike": all(torch.equal(gradient, other) for other in everyones),
    }


def recovery(world: World, num_plain: int) -> dict[str, Any]:
    """A NaN on one rank alone, after some steps: skipped, and gone with that."""
    trainer = unshard(world, *POWERSGD)
    batch = batches_at(world, 0, GLOBAL_BATCH)
    for step in range(num_plain):
        train_step(trainer, batch, RATE, step)
    before = [p.detach().clone() for p in trainer.network.parameters()]
    hook = trainer.parallel.register_forward_hook(
        lambda _m, _i, logits: fail("nan", logits) if world.rank == 1 else logits
    )
    train_step(trainer, batch, RATE, num_plain)
    hook.remove()
    kept = all(torch.equal(p, old) for p, old in zip(trainer.network.parameters(), before, strict=True))
    losses = [train_step(trainer, batch, RATE, num_plain + 1 + more).reduce(world).loss for more in range(2)]
    return {"kept": kept, "losses": losses, "skips": dataclasses.asdict(trainer.guard.read())}


def main() -> None:
    """Do all of it."""
    torch.set_num_threads(1)
    with open_world("cpu") as world:
        found: dict[str, Any] = {
            "ddp": traffic(world),
            "bf16": traffic(world, "compress=bf16"),
            "powersgd": traffic(world, *POWERSGD),
            "hybrid": traffic(world, "parallel=hybrid"),
            "distances": distances(world),
            "recovery": [recovery(world, num_plain) for num_plain in (2, 3)],
        }
        everyones: list[Any] = [None] * world.world_size
        dist.all_gather_object(everyones, found)
        if world.is_main:
            click.echo(json.dumps(everyones))


if __name__ == "__main__":
    main()
