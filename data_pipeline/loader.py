"""The door of loading: a `Loader` makes the batches of training, evaluation and prediction, in order.

The three share one core, `data_pipeline.loading.prefetch`. They differ in which samples make up a batch, and
in how an image is cropped.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import read_file
from data_pipeline.common.image_kind import name_bytes
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.decode.backend import ImageBackend
from data_pipeline.loading.bad_files import FaultLog
from data_pipeline.loading.batches import Batch, BatchRequest
from data_pipeline.loading.cache import DecodedCache
from data_pipeline.loading.prefetch import prefetch_batches
from data_pipeline.loading.readers import Samples
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.crop import eval_crop_params, ten_crop_params, train_crop_params
from data_pipeline.transforms.erase import erase_boxes_at
from data_pipeline.transforms.mix import PAIR_SIZE, mix_params_at
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.sampler import Int, order_at, positions_at, rank_slice, steps_per_epoch
from data_pipeline.transforms.trivial import trivial_params_at


class ImageSource(NamedTuple):
    """An encoded image that is not a file of its own.

    Attributes:
        path: its name in messages and rows.
        read: gives at most so many bytes, in any thread; raises `ImageError`.
    """

    path: Path
    read: Callable[[int], bytes]


@dataclass(frozen=True, eq=False)
class Loader:
    """Reads, decodes and crops: all that the batches of a run have in common.

    Attributes:
        backend: decodes; its `max_batch` bounds the micro-batch.
        preprocessing: the contract.
        prefetch: batches held ready, >= 1.
        read_threads: files read at once where Python reads them, >= 1.
        faults: logs and counts the bad files of all batches.
        caches: decoded pixels that are kept; batches of their datasets are made of those.
    """

    backend: ImageBackend
    preprocessing: Preprocessing
    prefetch: int = 2
    read_threads: int = 4
    faults: FaultLog = field(default_factory=FaultLog)
    caches: tuple[DecodedCache, ...] = ()

    def train(
        self,
        dataset: Dataset,
        augment: Augment,
        *,
        seed: int,
        global_batch: int,
        balance: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int | None = None,
        start_step: int = 0,
        num_steps: int | None = None,
    ) -> Generator[Batch, None, None]:
        """One rank's share of training steps, in order; a later start gives the tail of the same stream.

        Args:
            dataset: the training split.
            augment: the random crops and colours, and what the step changes, erases and mixes.
            seed: the run's seed.
            global_batch: samples of one step over all ranks.
            balance: how much rare classes are made frequent, 0..1: see `order_at`.
            rank: which rank, 0..world_size - 1.
            world_size: number of ranks.
            micro_batch: most samples in one batch that is yielded; None for the rank's whole share of the
                step. Where samples are mixed, an odd number counts as the even one below it.
            start_step: first global step, 0-based, counted through all epochs.
            num_steps: how many steps; None for no end.
        Yields:
            Batches; `step` is the global step, `last` whether it ends there; `trivial`, `erase` and `mix` are
            for the step to carry out.
        Raises:
            UserError: a global batch larger than the training set, or smaller than the number of ranks; with
                mixing, fewer pairs than ranks, or a micro-batch of one.
        """
        group_size = PAIR_SIZE if augment.mixes else 1
        share = _largest_share(len(dataset), global_batch, world_size, group_size)
        chunk = self._checked(micro_batch or share, needed=share) // group_size * group_size
        if chunk == 0:
            raise UserError("mixup and cutmix mix pairs: micro_batch must be at least 2, not 1")
        steps = count(start_step) if num_steps is None else range(start_step, start_step + num_steps)
        shares = (
            (step, *positions_at(step, len(dataset), global_batch, rank, world_size, group_size))
            for step in steps
        )
        return self._batches(self._train_requests(dataset, augment, seed, balance, chunk, shares))

    def _train_requests(
        self,
        dataset: Dataset,
        augment: Augment,
        seed: int,
        balance: float,
        chunk: int,
        shares: Iterable[tuple[int, int, Int]],
    ) -> Iterator[BatchRequest]:
        crop_px = self.preprocessing.crop_px
        order_of = lru_cache(maxsize=1)(partial(order_at, seed, labels=dataset.labels, balance=balance))
        for step, epoch, rank_positions in shares:
            order = order_of(epoch)
            for first in range(0, len(rank_positions), chunk):
                positions = rank_positions[first : first + chunk]
                indices = order[positions]
                yield BatchRequest(
                    samples=dataset,
                    labels=dataset.labels[indices],
                    indices=indices,
                    positions=positions,
                    step=step,
                    last=first + chunk >= len(rank_positions),
                    crop_fn=partial(
                        train_crop_params,
                        epoch=epoch,
                        positions=positions,
                        seed=seed,
                        preprocessing=self.preprocessing,
                        augment=augment,
                    ),
                    trivial=trivial_params_at(seed, epoch, positions, augment),
                    erase=erase_boxes_at(seed, epoch, positions, augment, crop_px),
                    mix=mix_params_at(seed, epoch, positions, augment, crop_px),
                )

    def eval(
        self,
        dataset: Dataset,
        *,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        ten_crop: bool = False,
    ) -> Generator[Batch, None, None]:
        """One rank's share of a split, each sample once over all ranks; the last batch may be smaller.

        Args: as `train`, and
            ten_crop: the paper's ten views of each image, (N, 10, crop, crop, 3), to average softmax outputs.
        Yields:
            Batches; none for a rank whose share is empty.
        """
        share = rank_slice(len(dataset), rank, world_size)
        chunk = self._checked(micro_batch, needed=share.stop - share.start)
        labels = dataset.labels[share]
        parts = ((dataset, labels[first : first + chunk].copy()) for first in range(0, len(labels), chunk))
        return self._batches(self._eval_requests(parts, share.start, ten_crop))

    def predict(
        self, inputs: Iterable[Path | ImageSource], *, micro_batch: int, ten_crop: bool = False
    ) -> Generator[Batch, None, None]:
        """Unlabelled images in the order given; `inputs` is consumed as batches are read ahead.

        Args: as `eval`, and
            inputs: files, and images that lie elsewhere.
        """
        chunk = self._checked(micro_batch, needed=micro_batch)

        def parts() -> Iterator[tuple[Samples, Int]]:
            remaining, first = iter(inputs), 0
            while items := tuple(islice(remaining, chunk)):
                yield _Inputs(items, first), np.full(len(items), -1, dtype=np.int64)
                first += len(items)

        return self._batches(self._eval_requests(parts(), 0, ten_crop))

    def _eval_requests(
        self, parts: Iterable[tuple[Samples, Int]], first: int, ten_crop: bool
    ) -> Iterator[BatchRequest]:
        """A request for each part, samples and their labels; `first` is the index of the first sample."""
        crop_params = ten_crop_params if ten_crop else eval_crop_params
        for number, (samples, labels) in enumerate(parts):
            indices = np.arange(first, first + len(labels), dtype=np.int64)
            first += len(labels)
            yield BatchRequest(
                samples=samples,
                labels=labels,
                indices=indices,
                positions=indices,
                step=number,
                last=True,
                crop_fn=partial(crop_params, preprocessing=self.preprocessing),
            )

    def _batches(self, requests: Iterator[BatchRequest]) -> Generator[Batch, None, None]:
        return prefetch_batches(
            requests,
            self.backend,
            self.caches,
            max_pixels=self.preprocessing.max_pixels,
            read_threads=self.read_threads,
            prefetch=self.prefetch,
            faults=self.faults,
        )

    def _checked(self, micro_batch: int, needed: int) -> int:
        if micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1, not {micro_batch}")
        if min(micro_batch, needed) > self.backend.max_batch:
            raise ValueError(
                f"micro_batch {micro_batch} is above the backend's max_batch {self.backend.max_batch}"
            )
        return micro_batch


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Some of a prediction's inputs as `Samples`; the first of them has the index `first`."""

    items: tuple[Path | ImageSource, ...]
    first: int
    table: None = None

    def path_at(self, index: int) -> Path:
        item = self.items[index - self.first]
        return item.path if isinstance(item, ImageSource) else item

    def read(self, index: int, max_bytes: int) -> bytes:
        item = self.items[index - self.first]
        if isinstance(item, ImageSource):
            return name_bytes(item.read(max_bytes), item.path.name)
        return read_file(item, max_bytes)


def _largest_share(num_samples: int, global_batch: int, world_size: int, group_size: int) -> int:
    """Most samples that one rank takes of a step, in whole groups of `group_size`."""
    steps_per_epoch(num_samples, global_batch)
    if global_batch < world_size:
        raise UserError(f"global_batch {global_batch} is smaller than the number of ranks, {world_size}")
    if -(-global_batch // group_size) < world_size:
        raise UserError(
            f"mixup and cutmix mix pairs: global_batch {global_batch} has fewer pairs than there are ranks, "
            f"{world_size}; set it to {group_size * world_size} or more"
        )
    return group_size * -(-global_batch // (group_size * world_size))
