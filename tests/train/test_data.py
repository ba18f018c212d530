"""Decoded pixels that are kept: where, and the batches that are cut from them on a device."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.sample_table import SampleTable
from data_pipeline.decode.pillow import PillowBackend
from data_pipeline.loader import Loader
from data_pipeline.loading.batches import Batch
from data_pipeline.loading.cache import CachedCrops, DecodedCache, create_store, fill_cache
from tests.helpers.crops import AUGMENTS
from tests.helpers.one_size import BAD, NUM_IMAGES, PREPROCESSING, count_equal, open_images
from train.config.schema import DataConfig, RunConfig
from train.data import choose_cache, gpu_bytes_available, open_caches, place_on_device
from train.distributed.world import open_world
from train.inputs.pass_inputs import to_device

GB = 10**9
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def split_of(name: str, heights: list[int]) -> Dataset:
    """Images of 1000 pixels width, 0.3 GB together if all are of 1000 pixels height."""
    count = 100 // len(heights)
    columns = {"lengths": 9, "kinds": 1, "orientations": 1, "direct": 1, "widths": 1000}
    table = SampleTable.from_columns(
        **{key: [value] * count * len(heights) for key, value in columns.items()}, heights=heights * count
    )
    return Dataset(Path(), name, (), np.zeros(len(table), np.int64), ("a", "b"), table=table)


SAME = (split_of("train", [1000]), split_of("val", [1000]))
MIXED = (split_of("train", [1000]), split_of("val", [1000, 999]))


@pytest.mark.parametrize(
    ("wanted", "device", "datasets", "epochs_left", "free_ram", "free_gpu", "place"),
    [
        # the images of both splits take 0.6 GB
        ("none", GPU, SAME, 90, 80 * GB, 80 * GB, "none"),
        ("auto", GPU, SAME, 90, 80 * GB, 80 * GB, "gpu"),
        ("auto", GPU, SAME, 2, 80 * GB, 2.4 * GB, "gpu"),
        ("auto", GPU, SAME, 1, 80 * GB, 80 * GB, "none"),  # read once
        ("auto", GPU, SAME, 0, 80 * GB, 80 * GB, "none"),  # a benchmark, or a run that is finished
        ("auto", GPU, SAME, 90, 80 * GB, 2.3 * GB, "ram"),
        ("auto", GPU, SAME, 90, 0.7 * GB, 80 * GB, "none"),  # the machine cannot pass it on
        ("auto", GPU, SAME, 90, 2.3 * GB, 2.3 * GB, "none"),
        ("auto", GPU, MIXED, 90, 80 * GB, 80 * GB, "none"),
        ("auto", CPU, SAME, 90, 2.4 * GB, None, "ram"),
        ("auto", CPU, SAME, 90, 2.3 * GB, None, "none"),
        ("auto", CPU, SAME, 90, None, None, "none"),  # no /proc
        ("ram", CPU, SAME, 1, 0.76 * GB, None, "ram"),
        ("ram", GPU, SAME, 90, 0.76 * GB, 1, "ram"),
        ("ram", CPU, SAME, 90, None, None, "ram"),
        ("gpu", GPU, SAME, 0, 0.76 * GB, 0.76 * GB, "gpu"),
    ],
)
def test_place_is_chosen_by_free_memory_and_epochs(
    wanted: Literal["none", "ram", "gpu", "auto"],
    device: torch.device,
    datasets: tuple[Dataset, ...],
    epochs_left: int,
    free_ram: float | None,
    free_gpu: float | None,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.data.bytes_available", lambda: free_ram)
    monkeypatch.setattr("train.data.gpu_bytes_available", lambda _: free_gpu)
    config = RunConfig(data=DataConfig(cache=wanted))
    assert choose_cache(config, device, datasets, epochs_left) == place
    # Bits that must repeat depend on no free memory: a GPU's decoder and what is kept differ.
    fixed = "none" if (wanted, device) == ("auto", GPU) else place
    config = RunConfig(data=DataConfig(cache=wanted), deterministic=True)
    assert choose_cache(config, device, datasets, epochs_left) == fixed


@pytest.mark.parametrize(
    ("wanted", "device", "datasets", "free_ram", "free_gpu", "message"),
    [
        ("ram", CPU, MIXED, 80, None, "keeps images of one size, and those of val have several: set it to"),
        ("gpu", GPU, MIXED, 80, 80, "keeps images of one size, and those of val have several: set it to"),
        ("gpu", CPU, SAME, 80, None, "is gpu and the run computes on the CPU: set it to ram"),
        ("ram", CPU, SAME, 0.74, None, "needs 0.6 GB of the machine's memory, and 0.74 GB are free: set it"),
        ("gpu", GPU, SAME, 0.74, 80, "needs 0.6 GB of the machine's memory, and 0.74 GB are free: set it"),
        ("gpu", GPU, SAME, 80, 0.74, "needs 0.6 GB of the GPU's memory, and 0.74 GB are free: set it to"),
    ],
)  # fmt: skip
def test_place_by_name_that_cannot_be_is_one_line(
    wanted: Literal["ram", "gpu"],
    device: torch.device,
    datasets: tuple[Dataset, ...],
    free_ram: float,
    free_gpu: float | None,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("train.data.bytes_available", lambda: free_ram * GB)
    monkeypatch.setattr("train.data.gpu_bytes_available", lambda _: free_gpu and free_gpu * GB)
    with pytest.raises(UserError) as caught:
        choose_cache(RunConfig(data=DataConfig(cache=wanted)), device, datasets, 90)
    assert str(caught.value).startswith("data.cache ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wanted", ["auto", "ram"])
def test_shared_memory_that_is_refused_ends_only_what_was_named(
    wanted: Literal["auto", "ram"], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(dataset: Dataset) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr("train.data.create_store", refuse)
    config = RunConfig(recipe="demo", data=DataConfig(cache=wanted))
    with open_world("cpu") as world, ExitStack() as stack:
        if wanted == "ram":
            with pytest.raises(UserError, match=r"^data\.cache is ram: File too large$"):
                open_caches(config, world, SAME, 90, stack)
            return
        with caplog.at_level(logging.INFO, "train"):
            assert open_caches(config, world, SAME, 90, stack) == ()
    assert caplog.messages == ["decoded images are not kept: File too large (data.cache)"]


@pytest.fixture
def cached(tmp_path: Path) -> Iterator[DecodedCache]:
    dataset = open_images(tmp_path)
    with closing(fill_cache(dataset, create_store(dataset), 1)) as cache:
        yield cache


def compare_on(device: torch.device, cache: DecodedCache, tolerance: int) -> None:
    """Batches of pixels that lie on a device, cropped there, against those of files."""

    def on_device(batch: Batch) -> torch.Tensor:
        images, labels, valid = to_device(batch, device)
        assert images.device == labels.device == valid.device == device
        return images

    placed = place_on_device(cache, device)
    assert placed.store is None and placed.pixels.device == device
    assert cache.store is not None and len(cache.store.pixels) == 0
    with closing(PillowBackend(2, 64)) as backend:
        loaders = [Loader(backend, PREPROCESSING, caches=caches) for caches in ((placed,), ())]
        for name, augment in AUGMENTS.items():
            options: dict[str, Any] = {"seed": 5, "global_batch": 32, "micro_batch": 20, "num_steps": 4}
            streams = [loader.train(cache.dataset, augment, **options) for loader in loaders]
            samples, _ = count_equal(*streams, pixels_of=on_device, tolerance=tolerance)
            assert samples == 4 * 32, name
        for ten_crop in (False, True):
            views = [loader.eval(cache.dataset, micro_batch=25, ten_crop=ten_crop) for loader in loaders]
            counts = count_equal(*views, pixels_of=on_device, tolerance=tolerance)
            assert counts == (NUM_IMAGES, len(BAD))


@pytest.mark.slow
def test_crops_made_on_a_device_are_the_uncached(cached: DecodedCache) -> None:
    compare_on(CPU, cached, tolerance=0)


@pytest.mark.gpu
def test_crops_made_on_a_gpu_are_the_uncached(cached: DecodedCache) -> None:
    before = gpu_bytes_available(GPU)
    assert before is not None and cached.pixels.nbytes < before <= torch.cuda.mem_get_info(GPU)[1]
    compare_on(GPU, cached, tolerance=1)


def test_batch_of_a_device_is_its_parameters(cached: DecodedCache) -> None:
    placed = place_on_device(cached, CPU)
    with closing(PillowBackend(1, 64)) as backend:
        batches = Loader(backend, PREPROCESSING, caches=(placed,)).eval(placed.dataset, micro_batch=50)
        first, second = batches
    assert isinstance(first.images, CachedCrops) and first.images.pixels is placed.pixels
    assert second.images.indices.tolist() == list(range(50, 70))
