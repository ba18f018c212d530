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
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset
from data_pipeline.decode.backend import make_backend
from data_pipeline.decode.dali import DEPTH
from data_pipeline.decode.dali_graph import HARDWARE_LOAD, dali
from data_pipeline.loader import Loader
from data_pipeline.loading.batches import Batch
from data_pipeline.loading.cache import DecodedCache, create_store, fill_cache
from data_pipeline.loading.scan import with_table
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.preprocessing import Preprocessing

BATCH, PREFETCH = 64, 2
ENDLESS = 1 << 40  # so many batches are never made
MakeBatches = Callable[[int], Generator[int, None, None]]  # so many batches, by the images in each


@dataclass(frozen=True)
class Subject:
    """One loader to measure: how it is opened, on which images or shards, and pinned to how many cores."""

    name: str
    make: Callable[[Subject, ExitStack], MakeBatches]
    folder: Path
    cores: int
    batch: int = BATCH
    crop_px: int = 224
    gpu: bool = False
    deterministic: bool = False
    decoder: Literal["auto", "dali", "pillow"] = "dali"
    overlaps: bool = False  # whether it is also measured beside a device that is busy


class LoaderCase:
    """A loader on so many cores, turning the benchmark's images into training batches."""

    def __init__(self, stack: ExitStack, subject: Subject) -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: subject.cores])
        self.subject, self.batches = subject, subject.make(subject, stack)
        self._time(2)

    def measure(self, batches: int) -> dict[str, float]:
        """Time as many images as so many batches of `BATCH` have, of a fast loader ten times as many."""
        size = self.subject.batch
        count = max(1, batches * BATCH // size) * (10 if size > BATCH else 1)  # or it would be too short
        images_per_s, cpu_us = self._time(count)
        found = {"images_per_s": images_per_s, "cpu_us": cpu_us}
        if self.subject.overlaps:  # a step as long as a batch's decoding took just now
            found["overlap_images_per_s"], _ = self._time(count, size / images_per_s)
        return found

    def memory(self, num_epochs: int, num_images: int) -> dict[str, list[float]]:
        """Return the resident memory of this process after each epoch over all images."""
        epoch = num_images // self.subject.batch
        made = enumerate(self.batches(num_epochs * epoch), start=1)
        return {"memory_mb": [resident_mb() for number, _ in made if number % epoch == 0]}

    def _time(self, num_batches: int, step_s: float = 0.0) -> tuple[float, float]:
        figures = time_batches(self.batches(num_batches + 1), num_batches, step_s)
        time.sleep(0.5)  # torch's workers finish what they read ahead
        return figures


def time_batches(
    batches: Generator[int, None, None], num_batches: int, step_s: float = 0.0, untimed: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[float, float]:  # fmt: skip
    """Return images per second once `untimed` batches came, and microseconds of our processors for an image.

    After each batch, a device is busy for `step_s`; `clock` may wait until one has finished its work.
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


def our_loader(
    subject: Subject, stack: ExitStack, finish: Callable[[Batch], object] = len,
    dataset: Dataset | None = None, caches: tuple[DecodedCache, ...] = (),
) -> MakeBatches:  # fmt: skip
    """Open this project's loader on a dataset, by default the subject's; `finish` takes each batch."""
    samples = open_samples(subject) if dataset is None else dataset
    preprocessing = Preprocessing(crop_px=subject.crop_px, resize_px=subject.crop_px)  # no crop depends on it
    backend = make_backend(
        subject.decoder, device="gpu" if subject.gpu else "cpu", preprocessing=preprocessing,
        max_batch=subject.batch, num_threads=subject.cores, deterministic=subject.deterministic,
    )  # fmt: skip
    stack.enter_context(closing(backend))
    loader, done = Loader(backend, preprocessing, PREFETCH, caches=caches), 0

    def batches(count: int) -> Generator[int, None, None]:
        nonlocal done
        stream = loader.train(
            samples, Augment(), seed=0, global_batch=subject.batch, start_step=done, num_steps=count
        )
        done += count
        with closing(stream):
            for batch in stream:
                assert batch.valid.all()
                finish(batch)
                yield len(batch)

    return batches


def open_samples(subject: Subject) -> Dataset:
    """Open the training split of a subject's folder."""
    return with_table(open_dataset(subject.folder, "train", quarantine=False), subject.cores)


def cached_loader(subject: Subject, stack: ExitStack, on_device: bool = False) -> MakeBatches:
    """Open this project's loader on decoded pixels in memory, or on the device."""
    dataset = open_samples(subject)
    cache = fill_cache(dataset, create_store(dataset), subject.cores)
    stack.callback(cache.close)
    if not on_device:
        return our_loader(subject, stack, len, dataset, (cache,))
    import torch

    from train.data import place_on_device
    from train.distributed.measure import wait_for
    from train.inputs.pass_inputs import images_on_device

    device = torch.device("cuda" if subject.gpu else "cpu")

    def crop(batch: Batch) -> None:
        images_on_device(batch.images, device)
        wait_for(device)

    return our_loader(subject, stack, crop, dataset, (place_on_device(cache, device),))


def dali_reader(subject: Subject, stack: ExitStack) -> MakeBatches:
    """Open DALI as its documentation has it: its file reader, its random crop, its own prefetching."""
    fn, types = dali.fn, dali.types
    mixed: dict[str, Any] = {"device": "mixed", "hw_decoder_load": HARDWARE_LOAD} if subject.gpu else {}
    with dali.Pipeline(
        batch_size=subject.batch, num_threads=subject.cores, device_id=0 if subject.gpu else None, seed=1,
        prefetch_queue_depth=DEPTH,
    ) as pipeline:  # fmt: skip
        encoded, labels = fn.readers.file(file_root=str(subject.folder / "train"), random_shuffle=True)
        crops = fn.decoders.image_random_crop(encoded, output_type=types.RGB, **mixed)
        size, linear = [subject.crop_px] * 2, types.INTERP_LINEAR
        images = fn.resize(crops, size=size, interp_type=linear, antialias=True)
        pipeline.set_outputs(fn.flip(images, horizontal=fn.random.coin_flip()), labels)
    pipeline.build()

    def batches(count: int) -> Generator[int, None, None]:
        for _ in range(count):
            images = pipeline.run()[0]  # copied, since it must outlive the next run, as every loader's does
            images = images.as_tensor() if subject.gpu else np.array(images.as_array())
            yield subject.batch

    return batches


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
        images, subject.batch, shuffle=True, num_workers=subject.cores, drop_last=True,
        persistent_workers=True,
    )  # fmt: skip
    return lambda count: (len(pixels) for pixels, _ in islice(chain.from_iterable(repeat(loader)), count))
