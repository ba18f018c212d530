"""The cases of `alexnet bench data`: our loader in its forms, and those it is compared with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipeline.common.machine import resident_mb
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset
from data_pipeline.decode.backend import ImageBackend, make_backend
from data_pipeline.decode.dali import DEPTH
from data_pipeline.decode.dali_graph import HARDWARE_LOAD, dali
from data_pipeline.decode.pillow import PillowBackend
from data_pipeline.loader import Loader
from data_pipeline.loading.batches import Batch
from data_pipeline.loading.cache import DecodedCache, create_store, fill_cache
from data_pipeline.loading.scan import with_table
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.preprocessing import Preprocessing
from train.bench import harness
from train.bench.feed import FeedOnly, checksums

SETTLE_S = 0.5
PREFETCH = 2
ENDLESS = 1 << 40
"""So many batches are never made."""
MakeBatches = Callable[[int], Generator[int, None, None]]
"""Makes so many batches and yields the number of images in each."""


@dataclass(frozen=True)
class Subject:
    """One loader to measure.

    Attributes:
        name: of the figure.
        make: opens the loader, a function of this file.
        folder: the images, or their shards.
        cores: to which it is pinned.
        batch: images in a batch.
        crop_px: side of the crops.
        gpu: whether it decodes on the GPU.
        deterministic: whether the GPU decodes to the same bytes each time.
        decoder: of our loader.
    """

    name: str
    make: Callable[[Subject, ExitStack], MakeBatches]
    folder: Path
    cores: int
    batch: int = 64
    crop_px: int = 224
    gpu: bool = False
    deterministic: bool = False
    decoder: Literal["auto", "dali", "pillow"] = "dali"

    @property
    def preprocessing(self) -> Preprocessing:
        """The contract: training's crops do not depend on its resize."""
        return Preprocessing(crop_px=self.crop_px, resize_px=self.crop_px)


class LoaderCase:
    """A loader on so many cores, turning the benchmark's images into training batches."""

    def __init__(self, stack: ExitStack, subject: Subject) -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: subject.cores])
        self._batches = subject.make(subject, stack)
        self.measure(2, 0)

    def measure(self, num_batches: int, step_s: float) -> tuple[float, float]:
        """Time some batches, and let torch's workers finish what they read ahead.

        Returns:
            Images per second; microseconds of this process's processors for each image.
        """
        figures = time_batches(self._batches(num_batches + 1), num_batches, step_s)
        time.sleep(SETTLE_S)
        return figures

    def memory_mb(self, num_epochs: int, batches_per_epoch: int) -> list[float]:
        """Return the resident memory of this process after each epoch over all images."""
        memory = []
        for number, _ in enumerate(self._batches(num_epochs * batches_per_epoch), start=1):
            if number % batches_per_epoch == 0:
                memory.append(harness.four_digits(resident_mb()))
        return memory


def time_batches(
    batches: Generator[int, None, None], num_batches: int, step_s: float = 0.0, untimed: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:  # fmt: skip
    """Time batches, from the arrival of the last that is not timed to that of the last; close the iterator.

    Args:
        num_batches: that are timed.
        step_s: for so long a device is busy after each batch.
        untimed: how many come first.
        clock: may wait until a device has finished its work.
    Returns:
        As `LoaderCase.measure`.
    """
    with closing(batches):
        for _ in range(untimed):
            next(batches)
        images, started, busy = 0, clock(), time.process_time()
        for _ in range(num_batches):
            if step_s:
                time.sleep(step_s)
            images += next(batches)
        seconds, busy = clock() - started, time.process_time() - busy
    return images / seconds, 1e6 * busy / images


def our_loader(subject: Subject, stack: ExitStack, finish: Callable[[Batch], object] = len) -> MakeBatches:
    """Open this project's loader on files or shards; `finish` takes each batch."""
    backend = make_backend(
        subject.decoder, device="gpu" if subject.gpu else "cpu", preprocessing=subject.preprocessing,
        max_batch=subject.batch, num_threads=subject.cores, deterministic=subject.deterministic,
    )  # fmt: skip
    stack.enter_context(closing(backend))
    return _batches_of(subject, backend, _open(subject), finish)


def cached_loader(subject: Subject, stack: ExitStack, on_device: bool = False) -> MakeBatches:
    """Open this project's loader on decoded pixels in memory, or on the device."""
    backend = PillowBackend(num_threads=1, max_batch=subject.batch)  # decodes nothing here
    stack.enter_context(closing(backend))
    dataset = _open(subject)
    cache = fill_cache(dataset, create_store(dataset), subject.cores)
    stack.callback(cache.close)
    if not on_device:
        return _batches_of(subject, backend, dataset, len, cache)
    import torch

    from train.bench.trainer import wait_for
    from train.data import place_on_device
    from train.inputs.pass_inputs import images_on_device

    device = torch.device("cuda" if subject.gpu else "cpu")

    def crop(batch: Batch) -> None:
        images_on_device(batch.images, device)
        wait_for(device)

    return _batches_of(subject, backend, dataset, crop, place_on_device(cache, device))


def feed_loader(subject: Subject, stack: ExitStack) -> MakeBatches:
    """Open this project's loader without a decoder; of shards, each image's checksum is compared."""
    dataset = _open(subject)
    backend = FeedOnly(dataset.reader is None, subject.batch, subject.cores)
    stack.enter_context(closing(backend))
    expected = np.zeros(len(dataset), np.uint64)
    if dataset.reader is not None:  # read another way than the loader does
        expected = checksums([np.frombuffer(dataset.read(i), np.uint8) for i in range(len(dataset))])

    def compare(batch: Batch) -> None:
        assert np.array_equal(batch.images, expected[batch.indices])

    return _batches_of(subject, backend, dataset, compare)


def file_read(subject: Subject, stack: ExitStack) -> MakeBatches:
    """Let DALI read the same files in a random order, and do nothing else."""
    fn, dataset, random = dali.fn, _open(subject), np.random.default_rng(0)
    prefix = f"{subject.folder}/train/".encode()
    paths = PackedStrings.pack(dataset.paths).padded(np.arange(len(dataset)), prefix)

    def choose() -> Any:
        return paths[random.integers(0, len(paths), subject.batch)]

    def graph() -> list[Any]:
        names = fn.external_source(choose, dtype=dali.types.UINT8, ndim=1, batch=True)
        return [fn.io.file.read(names).shape()]

    return _dali_batches(subject, graph, len)


def dali_reader(subject: Subject, stack: ExitStack) -> MakeBatches:
    """Open DALI as its documentation has it: its file reader, its random crop, its own prefetching."""
    fn, types = dali.fn, dali.types
    mixed: dict[str, Any] = {"device": "mixed", "hw_decoder_load": HARDWARE_LOAD} if subject.gpu else {}

    def graph() -> list[Any]:
        root = str(subject.folder / "train")
        encoded, labels = fn.readers.file(file_root=root, random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(encoded, output_type=types.RGB, **mixed)
        size = [subject.crop_px] * 2
        images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        return [fn.flip(images, horizontal=fn.random.coin_flip()), labels]

    def copy(images: Any) -> object:
        """Copy a batch, since it must outlive the next run, as every loader's does."""
        return images.as_tensor() if subject.gpu else np.array(images.as_array())

    return _dali_batches(subject, graph, copy)


def torchvision_loader(subject: Subject, stack: ExitStack) -> MakeBatches:
    """Open torch's DataLoader with torchvision's v2 transforms, a worker for each core, uint8 out."""
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(subject.crop_px, antialias=True)
    steps = [crop, v2.RandomHorizontalFlip(), v2.PILToTensor()]
    images = ImageFolder(str(subject.folder / "train"), transform=v2.Compose(steps))
    torch.set_num_threads(1)
    loader: Any = torch.utils.data.DataLoader(
        images,
        subject.batch,
        shuffle=True,
        num_workers=subject.cores,
        drop_last=True,
        persistent_workers=True,
    )

    def batches(count: int) -> Generator[int, None, None]:
        for pixels, _labels in islice(chain.from_iterable(repeat(loader)), count):
            yield len(pixels)

    return batches


def _open(subject: Subject) -> Dataset:
    return with_table(open_dataset(subject.folder, "train", quarantine=False), subject.cores)


def _batches_of(
    subject: Subject, backend: ImageBackend, dataset: Dataset, finish: Callable[[Batch], object],
    *caches: DecodedCache,
) -> MakeBatches:  # fmt: skip
    loader, done = Loader(backend, subject.preprocessing, PREFETCH, caches=caches), 0

    def batches(count: int) -> Generator[int, None, None]:
        nonlocal done
        stream = loader.train(
            dataset, Augment(), seed=0, global_batch=subject.batch, start_step=done, num_steps=count
        )
        done += count
        with closing(stream):
            for batch in stream:
                assert batch.valid.all()
                finish(batch)
                yield len(batch)

    return batches


def _dali_batches(
    subject: Subject, graph: Callable[[], list[Any]], use: Callable[[Any], object]
) -> MakeBatches:
    pipeline = dali.Pipeline(
        batch_size=subject.batch, num_threads=subject.cores, device_id=0 if subject.gpu else None, seed=1,
        prefetch_queue_depth=DEPTH,
    )  # fmt: skip
    with pipeline:
        pipeline.set_outputs(*graph())
    pipeline.build()

    def batches(count: int) -> Generator[int, None, None]:
        for _ in range(count):
            use(pipeline.run()[0])
            yield subject.batch

    return batches
