"""Opens a run's data: both splits with their sample tables, the decoder, and decoded pixels that are kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import bytes_available, usable_cores
from data_pipeline.common.passed_over import log_passed_over
from data_pipeline.datasets.dataset import Contents, Dataset, check_same_classes
from data_pipeline.datasets.demo import DEMO_ROOT, write_demo
from data_pipeline.datasets.open import open_recorded
from data_pipeline.decode.backend import make_backend
from data_pipeline.loader import Loader
from data_pipeline.loading.cache import DecodedCache, await_cache, bytes_needed, create_store, fill_cache
from data_pipeline.loading.pixel_store import PixelStore
from data_pipeline.loading.scan import with_table
from data_pipeline.remote.address import remote_url
from data_pipeline.remote.shards import local_root
from train.config.schema import DataConfig, RunConfig
from train.distributed.ddp import micro_batch_size
from train.distributed.world import World, cpu_share
from train.evaluate import EVAL_BATCH
from train.optim.class_weights import check_balance

log = logging.getLogger("train")

MIN_EPOCHS = 2
"""`data.cache = "auto"` keeps images that are read so often at least."""
AUTO_SHARE, MAX_SHARE = 0.25, 0.8
"""Shares of the free memory that the cache takes at most: by itself, and where it is asked for by name."""
PART = 4096
"""Images copied to a GPU at once."""


def open_data(config: RunConfig, world: World) -> tuple[Dataset, Dataset]:
    """Open the training and validation splits; the demo data is written first if it is configured.

    One rank of each machine looks at the images, if no table of them is kept; the others wait.

    Raises:
        UserError: no data folder named, one without the expected layout, or classes that
            cannot be balanced as configured.
    """
    if config.data.root is None:
        raise UserError(f"recipe {config.recipe} needs data: --data DIR, with train/ and val/ in it")
    if Path(config.data.root) == DEMO_ROOT:
        if world.local_rank == 0:
            write_demo(DEMO_ROOT)
        world.barrier()
    root = fetch_root(config.data, world)
    listed = Path(config.data.quarantine) if config.data.quarantine is not None else True
    train_set, val_set = (open_recorded(root, split, quarantine=listed) for split in ("train", "val"))
    check_same_classes(train_set, val_set)
    check_balance(config, train_set)
    for dataset in (train_set, val_set):
        log_passed_over(dataset.split, dataset.passed_over)
    with world.first_of_machine("the images are looked at"):
        return with_table(train_set, usable_cores()), with_table(val_set, usable_cores())


def fetch_root(data: DataConfig, world: World) -> Path:
    """The folder of the data on this machine. Shards that are elsewhere are fetched, once for each machine.

    Raises:
        UserError, CorruptFileError, SaveError: as `data_pipeline.remote.shards.local_root`.
    """
    assert data.root is not None
    if remote_url(data.root) is None:
        return Path(data.root)
    work = "the shards are fetched"
    with world.first_of_machine(work):
        root = local_root(data.root, ("train", "val"), cache_gb=data.remote_cache_gb)
    world.wait_for_machines(work)
    return root


def contents_on_ranks(world: World, datasets: Sequence[Dataset]) -> dict[str, Contents]:
    """The contents of each split, which are the same on all ranks: each machine may have data of its own.

    Raises:
        UserError: on every rank, naming the first that sees other images than rank 0.
    """
    contents = {dataset.split: dataset.contents() for dataset in datasets}
    first, *others = world.gather_objects(contents)
    for rank, other in enumerate(others, 1):
        if differing := [split for split in first if other[split] != first[split]]:
            raise UserError(
                f"rank {rank} sees other images of {' and '.join(differing)} than rank 0: give all machines "
                "the same data folder and the same quarantine list"
            )
    return contents


def open_loader(
    config: RunConfig, world: World, datasets: Sequence[Dataset], epochs_left: int, stack: ExitStack
) -> Loader:
    """Open the decoder, and the decoded pixels of both splits where they are kept; see `open_caches`."""
    backend = make_backend(
        config.data.backend,
        device="gpu" if world.device.type == "cuda" and config.data.backend != "pillow" else "cpu",
        device_id=world.local_rank,
        preprocessing=config.preprocessing,
        max_batch=max(micro_batch_size(config, world), EVAL_BATCH),
        num_threads=config.data.threads or cpu_share(world.local_world_size),
        deterministic=config.data.deterministic or config.deterministic,
        max_decoded_bytes=int(config.data.max_decoded_gb * 1e9),
    )
    stack.enter_context(closing(backend))
    caches = open_caches(config, world, datasets, epochs_left, stack)
    return Loader(backend, config.preprocessing, prefetch=config.data.prefetch, caches=caches)


def open_caches(
    config: RunConfig, world: World, datasets: Sequence[Dataset], epochs_left: int, stack: ExitStack
) -> tuple[DecodedCache, ...]:
    """Decode both splits and keep their pixels, where `data.cache` wants it: once a machine, or on each GPU.

    Args:
        epochs_left: how often the training images will still be read.
    Raises:
        UserError: the cache was asked for by name and cannot be.
        WorkerError: the process that decodes was killed.
    """
    stores: list[PixelStore] = []
    place: Literal["none", "ram", "gpu"] = "none"
    problem: UserError | None = None
    if world.local_rank == 0:
        try:
            place = choose_cache(config, world.device, datasets, epochs_left)
            if place != "none":
                stores = [stack.enter_context(closing(create_store(dataset))) for dataset in datasets]
        except UserError as error:
            problem = error
        except OSError as error:  # a limit on the size of files, for one, is one on shared memory too
            if config.data.cache == "auto":
                log.info(f"decoded images are not kept: {error.strerror or error} (data.cache)")
                place, stores = "none", []
            else:
                problem = UserError(f"data.cache is {config.data.cache}: {error.strerror or error}")
    answers = world.gather_objects((place, [store.address for store in stores], problem))
    for _, _, problem in answers:  # of any machine: the others would wait for its ranks
        if problem is not None:
            raise problem
    place, addresses, _ = answers[world.rank - world.local_rank]
    if world.local_rank:
        stores = [stack.enter_context(closing(PixelStore.attach(address))) for address in addresses]
    world.barrier()  # once its pixels are on its GPU, the process that decodes lets go of a store
    if place == "none":
        return ()
    caches = []
    for dataset, store in zip(datasets, stores, strict=True):
        if world.local_rank == 0:
            cache = fill_cache(dataset, store, usable_cores(), config.preprocessing.max_pixels)
        else:
            cache = await_cache(dataset, store)
        caches.append(place_on_device(cache, world.device) if place == "gpu" else cache)
    if world.is_main:
        size = sum(bytes_needed(dataset) or 0 for dataset in datasets)
        where = "on each GPU" if place == "gpu" else "in shared memory"
        log.info(f"every image is decoded once and kept {where}: {size / 1e9:.2g} GB (data.cache)")
    return tuple(caches)


def choose_cache(
    config: RunConfig, device: torch.device, datasets: Sequence[Dataset], epochs_left: int
) -> Literal["none", "ram", "gpu"]:
    """Choose where the decoded pixels of all splits are kept.

    With `deterministic` the choice may depend neither on free memory nor on where a run goes on, where kept
    pixels are not the decoder's to the bit: on a GPU.

    Raises:
        UserError: the place that is named cannot hold them, or their images differ in size.
    """
    wanted = config.data.cache
    if wanted == "none" or (wanted == "auto" and epochs_left < MIN_EPOCHS):
        return "none"
    if wanted == "auto" and config.deterministic and device.type == "cuda":
        log.info("images are decoded in each epoch (deterministic=true): data.cache=gpu keeps them")
        return "none"
    sizes = [bytes_needed(dataset) for dataset in datasets]
    needed, free_ram, free_gpu = sum(filter(None, sizes)), bytes_available(), gpu_bytes_available(device)
    if wanted == "auto":
        if None in sizes:
            return "none"
        # what a GPU keeps passes through the machine's memory
        if needed <= min(AUTO_SHARE * (free_gpu or 0), MAX_SHARE * (free_ram or 0)):
            return "gpu"
        return "ram" if needed <= AUTO_SHARE * (free_ram or 0) else "none"
    for dataset, size in zip(datasets, sizes, strict=True):
        if size is None:
            raise UserError(
                f"data.cache keeps images of one size, and those of {dataset.split} have several: set it to "
                "none, or resize the images"
            )
    if wanted == "gpu" and device.type != "cuda":
        raise UserError("data.cache is gpu and the run computes on the CPU: set it to ram")
    free = {"machine": free_ram} | ({"GPU": free_gpu} if wanted == "gpu" else {})
    for owner, available in free.items():
        if available is not None and needed > MAX_SHARE * available:
            raise UserError(
                f"data.cache needs {needed / 1e9:.2g} GB of the {owner}'s memory, and {available / 1e9:.2g} "
                "GB are free: set it to none"
            )
    return wanted


def gpu_bytes_available(device: torch.device) -> int | None:
    """Memory of a GPU that may still be taken, what torch holds and does not use included; None on a CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def place_on_device(cache: DecodedCache, device: torch.device) -> DecodedCache:
    """Copy the pixels of a cache to a device, part by part, and free the shared memory."""
    pixels_NHWC = torch.empty(cache.pixels.shape, dtype=torch.uint8, device=device)
    for first in range(0, len(pixels_NHWC), PART):
        part = np.array(cache.pixels[first : first + PART])  # torch warns of arrays that cannot be written to
        pixels_NHWC[first : first + PART].copy_(torch.from_numpy(part))
    return cache.place(pixels_NHWC)
