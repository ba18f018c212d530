"""The ranks of `tests.train.distributed.test_ddp`: torchrun … -m tests.helpers.ddp_ranks.

Rank 0 prints one JSON object of all ranks' results; the test checks it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from tests.helpers.hybrid_ranks import CLASSES, GLOBAL_BATCH, batches_at, linear_layers, make
from tests.helpers.norm_ranks import compare_norms
from train.bench.scaling import sent_bytes
from train.checkpoints.format import Snapshot
from train.checkpoints.write import save_checkpoint
from train.distributed.hybrid import gather_tensors
from train.distributed.world import World, open_world
from train.step import StepParts, train_step


def make_parts(world: World, *overrides: str) -> StepParts:
    """The parts of a step that takes its share of a batch at once."""
    return make(world, f"micro_batch={GLOBAL_BATCH}", "model.hidden_units=1024", *overrides)


def gradient_of(parts: StepParts, step: int) -> Tensor:
    """The gradient of a step that leaves the weights unchanged, flat."""
    train_step(parts, batches_at(parts.world, 0, GLOBAL_BATCH), 0.0, step)
    return torch.cat([p.grad.flatten().clone() for p in parts.network.parameters() if p.grad is not None])


def traffic(world: World, *overrides: str) -> dict[str, int]:
    """Bytes that this rank sends in a step, after DDP rebuilt its buckets, and the terms of the formulas."""
    parts = make_parts(world, *overrides)
    for step in range(3):
        before = sent_bytes()
        gradient_of(parts, step)
        world.barrier()
    in_fc = sum(p.numel() for layer in linear_layers(parts.network) for p in layer.parameters())
    return {
        "sent": sent_bytes() - before,
        "convolutions": sum(p.numel() for p in parts.network.parameters()) - in_fc,
        "fully connected": in_fc,
        "features": linear_layers(parts.network)[0].in_features,
        "hidden": linear_layers(parts.network)[-1].in_features,
    }


def rounding(world: World) -> dict[str, Any]:
    """The relative distance of the bf16 gradient from the plain one, and whether all ranks have the same."""
    plain, rounded = (gradient_of(make_parts(world, f"compress={kind}"), 0) for kind in ("none", "bf16"))
    gathered = world.all_gather(rounded)
    return {
        "distance": float((rounded - plain).norm() / plain.norm()),
        "equal": all(torch.equal(rounded, other) for other in gathered),
    }


def begun(world: World, folder: Path, mode: str) -> dict[str, Any]:
    """A network of other first weights that begins with a checkpoint, which rank 0 alone can find.

    Returns:
        Whether it has the checkpoint's weights, this rank's own initial ones nowhere; what is recorded; and,
        under plain DDP with frozen features, whether these stay and the rest moves alike after a step.
    """
    source = make_parts(world, "seed=7", "model.name=bn")
    expected = {name: tensor.clone() for name, tensor in source.network.state_dict().items()}
    if world.is_main:
        snapshot = Snapshot(
            step=1, epoch=0, samples_seen=1, config=source.config, classes=CLASSES, metrics={},
            states={"model": expected},
        )  # fmt: skip
        save_checkpoint(folder, snapshot)
    place = folder if world.is_main else "nowhere"
    freeze = "features" if mode == "ddp" else "none"
    own = (f"init_from={place}/step-00000001", f"parallel={mode}", f"freeze={freeze}", "model.name=bn")
    parts = make_parts(world, *own)
    whole = gather_tensors(parts.parallel, parts.network.state_dict())
    found: dict[str, Any] = {
        "equal": all(torch.equal(whole[name], tensor) for name, tensor in expected.items()),
        "loaded": len(parts.init.loaded) if parts.init is not None else None,
    }
    if mode == "ddp":
        train_step(parts, batches_at(world, 0, GLOBAL_BATCH), 0.01, 0)
        after = parts.network.state_dict()
        found["changed"] = sorted(n for n, tensor in after.items() if not torch.equal(tensor, expected[n]))
        found["alike"] = len({float(t) for t in world.all_gather(after["classifier.fc8.weight"].sum())})
    return found


def main() -> None:
    """Measure, and let rank 0 print."""
    torch.set_num_threads(1)
    with open_world("cpu") as world:
        found: dict[str, Any] = {
            "ddp": traffic(world),
            "bf16": traffic(world, "compress=bf16"),
            "hybrid": traffic(world, "parallel=hybrid"),
            "rounding": rounding(world),
            "norms": compare_norms(world),
            **{f"begun {mode}": begun(world, Path("begun", mode), mode) for mode in ("ddp", "hybrid")},
        }
        gathered = world.gather_objects(found)
        if world.is_main:
            click.echo(json.dumps(gathered))


if __name__ == "__main__":
    main()
