"""Hybrid parallelism: data parallel convolutions, fully connected layers sharded over the ranks.

The fully connected layers hold 96% of AlexNet's parameters and do 8% of its arithmetic; the convolutions the
other way round. So the convolutions' gradients are all-reduced, as under DistributedDataParallel, and the
fully connected layers exchange activations in place of gradients (`tensor_parallel`). The losses are those
of plain DDP. docs/scaling.md shows when it pays.

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
    gather_rows,
    gather_shards,
    shard,
    shard_bounds,
)
from train.distributed.world import World
from train.models.alexnet import AlexNet
from train.models.batch_norm import is_synchronized
from train.models.dropout import Dropout, masks_of
from train.optim.precision import Precision


def samples_of_passes(
    global_batch: int, world_size: int, micro_batch: int, group_size: int = 1
) -> list[list[int]]:
    """Return the samples of each rank in each pass of a step; 0 in a pass for which it has none left.

    A rank has as many passes as micro-batches (`data_pipeline.loader.Loader.train`), and their number and
    size may differ between ranks. A rank with fewer joins the first passes with no samples of its own, so
    that all share the last pass, in which DDP reduces the gradients.

    Args:
        micro_batch: most samples that a rank takes at once.
        group_size: so many consecutive samples are never separated.

    >>> samples_of_passes(25, 2, micro_batch=5)
    [[5, 5, 2], [5, 5, 3]]
    >>> samples_of_passes(25, 2, micro_batch=12)
    [[0, 12], [12, 1]]
    """
    chunk = micro_batch // group_size * group_size
    by_rank = []
    for rank in range(world_size):
        share = rank_slice(global_batch, rank, world_size, group_size)
        count = share.stop - share.start
        by_rank.append([min(chunk, count - first) for first in range(0, count, chunk)])
    most = max(map(len, by_rank))
    return [[0] * (most - len(sizes)) + sizes for sizes in by_rank]


def wrap_in_ddp(module: nn.Module, world: World, **options: Any) -> DistributedDataParallel:
    """Wrap a module that is the same on all ranks. So are its buffers: see `train.models.batch_norm`."""
    wrapped = DistributedDataParallel(
        module,
        device_ids=[world.local_rank] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **options,
    )
    wrapped.broadcast_buffers = False
    return wrapped


class HybridParallel(nn.Module):
    """An AlexNet over several ranks, in the place of DistributedDataParallel.

    Every rank must call every method, and run as many forward passes in a step as it has micro-batches, of
    the sizes that were planned.

    Args:
        network: the whole network, the same on all ranks; its fully connected layers are replaced by shards.
        sizes: the most samples that any rank brings to each pass of a step through the split layers.
    """

    def __init__(self, network: AlexNet, world: World, sizes: list[int]) -> None:
        super().__init__()
        self.network, self.world, self.sizes = network, world, sizes
        self.plan = MicroBatchPlan(world)
        self._next_sizes: Iterator[int] = iter(())
        self._masks_gathered = self._split_layers()
        trunk = nn.Sequential(network.features, network.avgpool, nn.Flatten())  # (N, 3, H, W) -> (N, F)
        # A bucket is about a layer: the later layers' gradients travel while the earlier ones' are computed.
        self.trunk = wrap_in_ddp(trunk, world, bucket_cap_mb=2)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Compute the logits (N, C) of this rank's images."""
        features_NF = self.trunk(images_NCHW)
        self._start_pass(features_NF)
        logits_NC: Tensor = self.network.classifier(features_NF)
        return logits_NC

    def _split_layers(self) -> bool:
        """Replace the fully connected layers by shards, and tell each dropout behind one which units it has.

        Returns:
            Whether such a dropout drops any.
        """
        kinds = iter((FirstColumnParallelLinear, ColumnParallelLinear, RowParallelLinear))
        units, drops = 0, False
        for name, layer in list(self.network.classifier.named_children()):
            if isinstance(layer, nn.Linear):
                self.network.classifier.register_module(name, next(kinds)(layer, self.plan))
                units = layer.out_features
            elif isinstance(layer, Dropout) and units:
                layer.first_unit, _ = shard_bounds(units, self.world.rank, self.world.world_size)
                drops = drops or layer.p > 0
        return drops

    def _start_pass(self, features_NF: Tensor) -> None:
        """Begin a pass through the split layers: how many samples each rank brings, and the rows of all."""
        self.plan.rows = next(self._next_sizes)
        assert len(features_NF) <= self.plan.rows, "the micro-batches are not those that were planned"
        if self._masks_gathered:
            masks = masks_of(self.network)
            own_N = masks.rows_for(features_NF)
            masks.rows_B = gather_rows(own_N, self.plan)

    def no_sync(self) -> AbstractContextManager[None]:
        """Accumulate the convolutions' gradients without reducing them; the shards' never are."""
        return self.trunk.no_sync()

    def start_step(self, num_batches: int, none_NCHW: Tensor, precision: Precision) -> None:
        """Begin a step in which this rank has so many micro-batches of its own.

        A rank with fewer micro-batches than another joins the passes that it has no samples for: through the
        sharded layers, and through the convolutions where the statistics of norms are over all ranks.

        Args:
            none_NCHW: no images, (0, 3, H, W).
        """
        # DDP rebuilds its buckets in the second step's first pass, and waits for all ranks there, while some
        # of them may wait in a pass of the sharded layers: rebuild them now, when all ranks are here.
        self.trunk.reducer._rebuild_buckets()
        missing = len(self.sizes) - num_batches
        assert missing >= 0, "more micro-batches than were planned"
        self._next_sizes = iter(self.sizes)
        first = next(m for m in self.network.modules() if isinstance(m, FirstColumnParallelLinear))
        for _ in range(missing):
            with self.no_sync():
                with precision.autocast():
                    if is_synchronized(self.network):
                        none_NF = self.trunk(none_NCHW)
                    else:
                        none_NF = none_NCHW.new_empty(0, first.in_features).requires_grad_()
                    self._start_pass(none_NF)
                    logits_NC = self.network.classifier(none_NF)
                torch.autograd.backward(logits_NC.sum())

    def global_norm_tensors(
        self, scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer
    ) -> list[Tensor]:
        """Return tensors whose total norm is that of the whole gradient, the same on every rank.

        So every rank's check for NaN and spikes agrees. Call it after `unscale_`: float16's overflow on one
        rank becomes that of all.

        Returns:
            The gradients that every rank holds, and the norm of all ranks' shards.
        """
        if scaler.is_enabled():
            for found_inf in scaler._found_inf_per_device(optimizer).values():
                dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
        specs = self.shard_specs()
        grads = [(n in specs, p.grad) for n, p in self.network.named_parameters() if p.grad is not None]
        squares = get_total_norm([grad for is_shard, grad in grads if is_shard]).double().square()
        dist.all_reduce(squares)
        return [*(grad for is_shard, grad in grads if not is_shard), squares.sqrt().float()]

    def shard_specs(self) -> dict[str, tuple[int, int]]:
        """Map the name of each sharded parameter to its sharded dimension and the full size along it."""
        return {
            f"{prefix}.{name}": (dim, size)
            for prefix, layer in self.network.named_modules()
            if isinstance(layer, ParallelLinear)
            for name, dim, size in layer.sharded_params()
        }

    def unshard(self) -> AlexNet:
        """Return the network as one rank alone would hold it, for evaluation and checkpoints."""
        layers = OrderedDict(
            (name, layer.unshard() if isinstance(layer, ParallelLinear) else layer)
            for name, layer in self.network.classifier.named_children()
        )
        whole = AlexNet(self.network.features, self.network.avgpool, nn.Sequential(layers))
        return whole.train(self.network.training)


Parallel: TypeAlias = DistributedDataParallel | HybridParallel
"""A network over several ranks, either way."""


def whole_network(parallel: Parallel) -> AlexNet:
    """Return the unsharded network, on every rank; all must call this. Under plain DDP each rank has it."""
    network = parallel.unshard() if isinstance(parallel, HybridParallel) else parallel.module
    assert isinstance(network, AlexNet)
    return network


def gather_tensors(parallel: Parallel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Unshard tensors that have the names of the network's own, on every rank; all must call this."""
    return _change_shards(parallel, tensors, gather_shards)


def shard_tensors(parallel: Parallel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return this rank's shards of tensors from `gather_tensors`, gathered in whichever mode."""
    return _change_shards(parallel, tensors, lambda whole, dim, _, world: shard(whole, dim, world))


def _change_shards(
    parallel: Parallel, tensors: Mapping[str, Tensor], change: Callable[[Tensor, int, int, World], Tensor]
) -> dict[str, Tensor]:
    if not isinstance(parallel, HybridParallel):
        return dict(tensors)
    specs, world = parallel.shard_specs(), parallel.world
    return {
        name: change(tensor, *specs[name], world) if name in specs else tensor
        for name, tensor in tensors.items()
    }


def map_optimizer_state(
    parallel: Parallel,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    change: Callable[[Parallel, Mapping[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Any]:
    """Gather the tensors of an optimiser's `state_dict`, or shard them; every rank must call this.

    Args:
        state: of the optimiser, or of the unsharded network's; it numbers the parameters in their order.
        change: `gather_tensors` or `shard_tensors`.
    """
    network = parallel.network if isinstance(parallel, HybridParallel) else parallel.module
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    name_of = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]

    def changed(number: int, value: Any) -> Any:
        if number >= len(name_of) or not isinstance(value, Tensor) or not value.ndim:
            return value
        (tensor,) = change(parallel, {name_of[number]: value}).values()
        return tensor

    states = {
        number: {key: changed(number, value) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": states}
