"""Hybrid parallelism: convolutions data parallel, fully connected layers split over the ranks.

The fully connected layers hold 96% of AlexNet's parameters and do 8% of its arithmetic; the convolutions the
other way round. So the gradients of the convolutions travel, as under DistributedDataParallel, and of the
rest the activations (`tensor_parallel`). The losses are those of plain DDP. docs/scaling.md says when it
pays.

Source: Krizhevsky 2014, "One weird trick for parallelizing convolutional neural networks".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from data_pipeline.transforms.sampler import rank_slice
from train.distributed.tensor_parallel import (
    ColumnParallelLinear,
    FirstColumnParallelLinear,
    MicroBatchPlan,
    ParallelLinear,
    RowParallelLinear,
    gather_shards,
    shard,
)
from train.distributed.world import World
from train.models.alexnet import AlexNet
from train.optim.precision import Precision


def micro_batch_sizes(global_batch: int, world_size: int, micro_batch: int, group_size: int = 1) -> list[int]:
    """How many samples each rank brings to each pass of a step through the split layers, the same for all.

    A rank has as many passes as micro-batches (`data_pipeline.loader.Loader.train`), and their number and
    size may differ between ranks. Who has fewer joins the first passes with none of its own: so all end with
    the same pass, in which DDP sums the gradients.

    Args:
        micro_batch: most samples that a rank takes at once.
        group_size: so many samples are never parted.

    >>> micro_batch_sizes(25, 2, micro_batch=5)
    [5, 5, 3]
    >>> micro_batch_sizes(25, 2, micro_batch=4)
    [4, 4, 4, 4]
    """
    chunk = micro_batch // group_size * group_size
    by_rank = []
    for rank in range(world_size):
        share = rank_slice(global_batch, rank, world_size, group_size)
        count = share.stop - share.start
        by_rank.append([min(chunk, count - first) for first in range(0, count, chunk)])
    most = max(map(len, by_rank))
    padded = [[0] * (most - len(sizes)) + sizes for sizes in by_rank]
    return [max(sizes) for sizes in zip(*padded, strict=True)]


class _Trunk(nn.Module):
    """An AlexNet up to the fully connected layers: (N, 3, H, W) -> (N, F)."""

    def __init__(self, network: AlexNet) -> None:
        super().__init__()
        self.features, self.avgpool = network.features, network.avgpool

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return torch.flatten(self.avgpool(self.features(images_NCHW)), 1)


class HybridParallel(nn.Module):
    """An AlexNet over several ranks, in the place of DistributedDataParallel.

    Every rank calls everything here, and in a step as many forward passes as its micro-batches, of the sizes
    of which `micro_batch_sizes` was made.

    Args:
        network: the whole network, the same on all ranks; its fully connected layers are replaced by parts.
        rows: see `micro_batch_sizes`.
    """

    def __init__(self, network: AlexNet, world: World, rows: list[int]) -> None:
        super().__init__()
        self.network, self.world, self.rows = network, world, rows
        self.plan = MicroBatchPlan(world)
        self._coming: Iterator[int] = iter(())
        names = [name for name, layer in network.classifier.named_children() if isinstance(layer, nn.Linear)]
        for name, kind in zip(
            names, (FirstColumnParallelLinear, ColumnParallelLinear, RowParallelLinear), strict=True
        ):
            whole = network.classifier.get_submodule(name)
            assert isinstance(whole, nn.Linear)
            network.classifier.register_module(name, kind(whole, self.plan))
        self.trunk = DistributedDataParallel(
            _Trunk(network),
            device_ids=[world.local_rank] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # about a layer: the later ones' gradients travel while the earlier ones compute theirs
            bucket_cap_mb=2,
        )
        # DDP would send them in a rank's first pass, which is not always the others': start_step does so.
        self.trunk.broadcast_buffers = False

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """This rank's images to their logits (N, C)."""
        features_NF = self.trunk(images_NCHW)
        self.plan.rows = next(self._coming)
        assert len(features_NF) <= self.plan.rows, "the micro-batches are not those that were planned"
        logits_NC: Tensor = self.network.classifier(features_NF)
        return logits_NC

    def no_sync(self) -> AbstractContextManager[None]:
        """The convolutions' gradients stay here; those of the split layers do so in any case."""
        return self.trunk.no_sync()

    def start_step(self, num_batches: int, precision: Precision) -> None:
        """Begin a step in which this rank has so many micro-batches of its own.

        Running statistics become rank 0's, as under DDP. A rank with fewer micro-batches than another joins
        the passes that it has no samples for.
        """
        for buffer in self.network.buffers():
            dist.broadcast(buffer, src=0)
        # DDP orders its buckets anew in the second step's first pass, and waits for all ranks, some of which
        # may wait in a pass of the split layers: let it do so now.
        self.trunk.reducer._rebuild_buckets()
        missing = len(self.rows) - num_batches
        assert missing >= 0, "more micro-batches than were planned"
        self._coming = iter(self.rows)
        first = next(m for m in self.network.modules() if isinstance(m, FirstColumnParallelLinear))
        for _ in range(missing):
            self.plan.rows = next(self._coming)
            none_NF = torch.empty(0, first.in_features, device=self.world.device, requires_grad=True)
            with precision.autocast():
                logits_NC = self.network.classifier(none_NF)
            torch.autograd.backward(logits_NC.sum())

    def agree(self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        """Make of this step's gradients what all ranks judge alike; called when they are unscaled.

        float16's overflow on one rank becomes that of all.

        Returns:
            Tensors whose norm is that of the whole gradient: those that every rank holds, and the norm of the
            parts of all ranks.
        """
        if scaler.is_enabled():
            for found in scaler._found_inf_per_device(optimizer).values():
                dist.all_reduce(found, op=dist.ReduceOp.MAX)
        places = self.places()
        grads = [(n in places, p.grad) for n, p in self.network.named_parameters() if p.grad is not None]
        squares = get_total_norm([grad for sharded, grad in grads if sharded]).double().square()
        dist.all_reduce(squares)
        return [*(grad for sharded, grad in grads if not sharded), squares.sqrt().float()]

    def places(self) -> dict[str, tuple[int, int]]:
        """For each parameter of which a rank holds a part: the dimension, and the whole's size along it."""
        return {
            f"{prefix}.{name}": (dim, size)
            for prefix, layer in self.network.named_modules()
            if isinstance(layer, ParallelLinear)
            for name, dim, size in layer.sharded()
        }

    def unshard(self) -> AlexNet:
        """The network as one rank alone would hold it, for evaluation and checkpoints."""
        layers = OrderedDict(
            (name, layer.unshard() if isinstance(layer, ParallelLinear) else layer)
            for name, layer in self.network.classifier.named_children()
        )
        whole = AlexNet(self.network.features, self.network.avgpool, nn.Sequential(layers))
        return whole.train(self.network.training)


Parallel: TypeAlias = DistributedDataParallel | HybridParallel
"""A network over several ranks, either way."""


def whole_network(parallel: Parallel) -> AlexNet:
    """The unsplit network, on every rank; all must call this. Under plain DDP it is what each rank has."""
    network = parallel.unshard() if isinstance(parallel, HybridParallel) else parallel.module
    assert isinstance(network, AlexNet)
    return network


def gather_tensors(parallel: Parallel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that go with the network's own by name, unsplit, on every rank; all must call this."""
    if not isinstance(parallel, HybridParallel):
        return dict(tensors)
    places = parallel.places()
    return {
        name: gather_shards(tensor, *places[name], parallel.world) if name in places else tensor
        for name, tensor in tensors.items()
    }


def shard_tensors(parallel: Parallel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of what `gather_tensors` gave, in whichever mode it did."""
    if not isinstance(parallel, HybridParallel):
        return dict(tensors)
    places = parallel.places()
    return {
        name: shard(tensor, places[name][0], parallel.world) if name in places else tensor
        for name, tensor in tensors.items()
    }


def gather_optimizer_state(parallel: Parallel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's `state_dict` as of the unsplit network, on every rank; all must call this."""
    return _change_state(parallel, optimizer, optimizer.state_dict(), gather_tensors)


def shard_optimizer_state(
    parallel: Parallel, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> dict[str, Any]:
    """This rank's part of what `gather_optimizer_state` gave, in whichever mode it did."""
    return _change_state(parallel, optimizer, state, shard_tensors)


def _change_state(
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    change: Callable[[Parallel, Mapping[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Any]:
    """Change what an optimiser keeps of each parameter; its state numbers the parameters in their order."""
    network = parallel.network if isinstance(parallel, HybridParallel) else parallel.module
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    numbered = enumerate(p for group in optimizer.param_groups for p in group["params"])
    own = {number: names[id(parameter)] for number, parameter in numbered}
    changed = {
        number: {
            key: change(parallel, {own[number]: value})[own[number]]
            if number in own and isinstance(value, Tensor) and value.ndim
            else value
            for key, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {**state, "state": changed}
