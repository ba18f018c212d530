"""Batches in order: bytes read ahead by threads, decoded in the background, bad files isolated and named.

Training, evaluation and prediction share one core. They differ only in which files make up a batch
and in the recipe by which an image is cut.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import read_file
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.decode.pillow import PillowBackend
from data_pipeline.loading.bad_files import FaultLog
from data_pipeline.loading.prefetch import Batch, BatchRequest, ImageBackend, prefetch_batches
from data_pipeline.loading.readers import ReaderPool
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.crop import CropParams, eval_crop_params, ten_crop_params, train_crop_params
from data_pipeline.transforms.mix import PAIR_SIZE, MixParams, mix_params_at
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.sampler import Int, permutation_at, positions_at, rank_slice, steps_per_epoch

log = logging.getLogger("data_pipeline")


class ImageSource(NamedTuple):
    """An encoded image that is no file of its own: how messages and rows name it, and what gives its bytes.

    Args:
        path: its name.
        read: gives at most so many bytes, in any thread; raises `ImageError`.
    """

    path: Path
    read: Callable[[int], bytes]


def make_backend(
    name: Literal["auto", "dali", "pillow"],
    *,
    device: Literal["cpu", "gpu"],
    device_id: int = 0,
    preprocessing: Preprocessing,
    max_batch: int,
    num_threads: int,
) -> ImageBackend:
    """Choose what decodes.

    Args:
        name: "auto" is DALI where it is installed, else Pillow, and says so.
        device: where DALI decodes. Pillow decodes on the CPU.
        device_id: which GPU.
        preprocessing: the contract.
        max_batch: most samples in one batch.
        num_threads: decoding threads.
    Returns:
        The backend; close it when done.
    Raises:
        UserError: DALI was asked for and is not installed, or Pillow on a GPU.
    """
    if name == "pillow" and device == "gpu":
        raise UserError("the pillow backend decodes on the CPU only: use the dali backend, or device cpu")
    if name != "pillow":
        try:
            from data_pipeline.decode.dali import DaliBackend
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("nvidia"):
                raise
            if name == "dali" or device == "gpu":
                raise UserError("DALI is not installed: pip install 'alexnet[train]'") from error
            log.info("DALI is not installed: Pillow decodes, on the CPU")
        else:
            return DaliBackend(device, device_id, preprocessing.crop_px, max_batch, num_threads)
    return PillowBackend(num_threads, max_batch)


def train_batches(
    dataset: Dataset,
    backend: ImageBackend,
    preprocessing: Preprocessing,
    augment: Augment,
    *,
    seed: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    micro_batch: int | None = None,
    start_step: int = 0,
    num_steps: int | None = None,
    read_threads: int = 4,
    prefetch: int = 2,
    faults: FaultLog | None = None,
    readers: ReaderPool | None = None,
) -> Generator[Batch, None, None]:
    """One rank's share of training steps, in order. Any start gives what a run from step 0 would have given.

    Args:
        dataset: the training split.
        backend: decodes; its `max_batch` bounds the micro-batch.
        preprocessing: the contract.
        augment: the random cut and colours, and how samples are mixed.
        seed: the run's seed.
        global_batch: samples of one step over all ranks.
        rank: which rank, 0..world_size - 1.
        world_size: number of ranks.
        micro_batch: most samples in one batch that is yielded; None for the rank's whole share of the step.
            Where samples are mixed, an odd number counts as the even one below it.
        start_step: first global step, 0-based, counted through all epochs.
        num_steps: how many steps; None for no end.
        read_threads: files read at once.
        prefetch: batches held ready, >= 1.
        faults: where bad files are named and counted.
        readers: processes that read the dataset's files, in place of threads.
    Yields:
        Batches; `step` says which step, `last` whether it ends there, `mix` how its samples are mixed.
    Raises:
        UserError: a global batch larger than the training set, or smaller than the number of ranks; with
            mixing, fewer pairs than ranks, or a micro-batch of one.
    """
    group_size = PAIR_SIZE if augment.mixes else 1
    steps_per_epoch(len(dataset), global_batch)
    if global_batch < world_size:
        raise UserError(f"global_batch {global_batch} is smaller than the number of ranks, {world_size}")
    if -(-global_batch // group_size) < world_size:
        raise UserError(
            f"mixup and cutmix mix pairs: global_batch {global_batch} has fewer pairs than there are ranks, "
            f"{world_size}; set it to {group_size * world_size} or more"
        )
    share = group_size * -(-global_batch // (group_size * world_size))
    chunk = _checked_chunk(micro_batch or share, backend, needed=share) // group_size * group_size
    if chunk == 0:
        raise UserError("mixup and cutmix mix pairs: micro_batch must be at least 2, not 1")
    end_step = None if num_steps is None else start_step + num_steps

    def requests() -> Iterator[BatchRequest]:
        step = start_step
        while end_step is None or step < end_step:
            epoch, positions = positions_at(step, len(dataset), global_batch, rank, world_size, group_size)
            indices = permutation_at(seed, epoch, len(dataset))[positions]
            for first in range(0, len(indices), chunk):
                places = positions[first : first + chunk]
                chosen = indices[first : first + chunk]

                def cut(sizes: Int, epoch: int = epoch, places: Int = places) -> CropParams:
                    return train_crop_params(sizes, epoch, places, seed, preprocessing, augment)

                last = first + chunk >= len(indices)
                mix = mix_params_at(seed, epoch, places, augment, preprocessing.crop_px)
                yield _dataset_request(dataset, chosen, places, step, last, cut, mix)
            step += 1

    return prefetch_batches(
        requests(), backend, preprocessing.max_pixels, read_threads, prefetch, faults, readers
    )


def eval_batches(
    dataset: Dataset,
    backend: ImageBackend,
    preprocessing: Preprocessing,
    *,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    ten_crop: bool = False,
    read_threads: int = 4,
    prefetch: int = 2,
    faults: FaultLog | None = None,
    readers: ReaderPool | None = None,
) -> Generator[Batch, None, None]:
    """One rank's share of a split, every sample exactly once over all ranks; the last batch may be smaller.

    Args: as `train_batches`, and
        ten_crop: the paper's ten views of each image, (N, 10, crop, crop, 3), for averaging softmax outputs.
    Yields:
        Batches; none for a rank whose share is empty.
    """
    share = rank_slice(len(dataset), rank, world_size)
    cut = partial(ten_crop_params if ten_crop else eval_crop_params, preprocessing=preprocessing)
    chunk = _checked_chunk(micro_batch, backend, needed=share.stop - share.start)

    def requests() -> Iterator[BatchRequest]:
        for number, first in enumerate(range(share.start, share.stop, chunk)):
            indices = np.arange(first, min(first + chunk, share.stop), dtype=np.int64)
            yield _dataset_request(dataset, indices, indices, number, True, cut)

    return prefetch_batches(
        requests(), backend, preprocessing.max_pixels, read_threads, prefetch, faults, readers
    )


def predict_batches(
    inputs: Iterable[Path | ImageSource],
    backend: ImageBackend,
    preprocessing: Preprocessing,
    *,
    micro_batch: int,
    ten_crop: bool = False,
    read_threads: int = 4,
    prefetch: int = 2,
    faults: FaultLog | None = None,
) -> Generator[Batch, None, None]:
    """Unlabelled images in the order given; `inputs` is consumed as batches are read ahead, never as a whole.

    Args: as `eval_batches`, and
        inputs: files, and images that lie elsewhere.
    """
    cut = partial(ten_crop_params if ten_crop else eval_crop_params, preprocessing=preprocessing)
    chunk = _checked_chunk(micro_batch, backend, needed=micro_batch)

    def requests() -> Iterator[BatchRequest]:
        source, number, first = iter(inputs), 0, 0
        while group := tuple(islice(source, chunk)):
            indices = np.arange(first, first + len(group), dtype=np.int64)
            labels = np.full(len(group), -1, dtype=np.int64)
            paths = tuple(item.path if isinstance(item, ImageSource) else item for item in group)

            def read(place: int, max_bytes: int, group: tuple[Path | ImageSource, ...] = group) -> bytes:
                item = group[place]
                return item.read(max_bytes) if isinstance(item, ImageSource) else read_file(item, max_bytes)

            yield BatchRequest(paths, read, labels, indices, indices, number, True, cut)
            number, first = number + 1, first + len(group)

    return prefetch_batches(requests(), backend, preprocessing.max_pixels, read_threads, prefetch, faults)


def _checked_chunk(micro_batch: int, backend: ImageBackend, needed: int) -> int:
    if micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1, not {micro_batch}")
    if min(micro_batch, needed) > backend.max_batch:
        raise ValueError(f"micro_batch {micro_batch} is above the backend's max_batch {backend.max_batch}")
    return micro_batch


def _dataset_request(
    dataset: Dataset,
    indices: Int,
    positions: Int,
    step: int,
    last: bool,
    cut: Callable[[Int], CropParams],
    mix: MixParams | None = None,
) -> BatchRequest:
    def read(place: int, max_bytes: int) -> bytes:
        return dataset.read(int(indices[place]), max_bytes)

    paths = tuple(dataset.path_at(int(i)) for i in indices)
    return BatchRequest(
        paths, read, dataset.labels[indices], indices, positions, step, last, cut, mix, dataset
    )
