"""Batches that are cropped from decoded pixels: the same, to the bit, as those that are decoded anew."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import WorkerError
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.image_folder import load_image_folder
from data_pipeline.datasets.open import open_dataset
from data_pipeline.decode.backend import ImageBackend, make_backend
from data_pipeline.decode.pillow import PillowBackend
from data_pipeline.loader import Loader
from data_pipeline.loading import cache as cache_module
from data_pipeline.loading.cache import (
    DecodedCache,
    await_cache,
    bytes_needed,
    create_store,
    fill_cache,
    image_size,
)
from data_pipeline.loading.pixel_store import PixelStore
from data_pipeline.loading.scan import Chunk, with_table
from data_pipeline.sharding.write import write_shards
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.preprocessing import Preprocessing
from tests.helpers.crops import AUGMENTS
from tests.helpers.images import broken, encode, huge_png, photo
from tests.helpers.one_size import (
    BAD,
    NUM_IMAGES,
    PREPROCESSING,
    SIZE,
    count_equal,
    open_images,
    write_images,
)


@pytest.fixture(scope="module", params=["files", "shards"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Of the files, one is gone since they were looked at."""
    root = tmp_path_factory.mktemp("data")
    found = open_images(root)
    if request.param == "shards":
        write_images(root / "val")
        write_shards(root, root / "shards", shard_bytes=50_000, workers=1)
        return open_dataset(root / "shards", "train")
    found.path_at(NUM_IMAGES - 1).unlink()
    return found


@pytest.fixture(scope="module", params=["dali", "pillow"])
def backend(request: pytest.FixtureRequest) -> Iterator[ImageBackend]:
    made = make_backend(request.param, device="cpu", preprocessing=PREPROCESSING, max_batch=64, num_threads=1)
    with closing(made):
        yield made


@pytest.fixture(scope="module")
def cache(dataset: Dataset) -> Iterator[DecodedCache]:
    with closing(fill_cache(dataset, create_store(dataset), 1)) as filled:
        yield filled


@pytest.fixture(scope="module")
def loaders(backend: ImageBackend, cache: DecodedCache) -> tuple[Loader, Loader]:
    """One with the cache, one without."""
    return Loader(backend, PREPROCESSING, caches=(cache,)), Loader(backend, PREPROCESSING)


@pytest.mark.parametrize("kind", AUGMENTS)
def test_cached_training_is_the_uncached(kind: str, loaders: tuple[Loader, Loader], dataset: Dataset) -> None:
    options: dict[str, Any] = {"seed": 3, "global_batch": 23, "num_steps": 6}
    samples, failed = count_equal(*(loader.train(dataset, AUGMENTS[kind], **options) for loader in loaders))
    assert samples == 6 * 23 and failed >= 2 * len(BAD) - 2  # two epochs, each without one sample


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 1, "world_size": 2},
        {"rank": 2, "world_size": 3, "micro_batch": 3},
        {"micro_batch": 10, "start_step": 2, "balance": 1.0},
        {"rank": 0, "world_size": 3, "start_step": 5, "micro_batch": 4},
    ],
)
def test_cached_share_of_a_rank_is_the_uncached(
    options: dict[str, Any], loaders: tuple[Loader, Loader], dataset: Dataset
) -> None:
    """With colours and what the step does; samples that failed are not mixed."""
    augment = Augment(mixup=0.4, cutmix=1.0, brightness=0.4, hue=0.2, trivial=True, erase=0.5)
    samples, failed = count_equal(
        *(
            loader.train(dataset, augment, seed=5, global_batch=23, num_steps=3, **options)
            for loader in loaders
        )
    )
    assert (
        samples == 3 * {1: 23, 2: 11, 3: 8 if options.get("rank") == 0 else 7}[options.get("world_size", 1)]
    )
    assert failed > 0


@pytest.mark.parametrize("ten_crop", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_cached_evaluation_is_the_uncached(
    world_size: int, ten_crop: bool, loaders: tuple[Loader, Loader], dataset: Dataset
) -> None:
    samples = failed = 0
    for rank in range(world_size):
        options: dict[str, Any] = {"rank": rank, "world_size": world_size, "ten_crop": ten_crop}
        share = count_equal(*(loader.eval(dataset, micro_batch=9, **options) for loader in loaders))
        samples, failed = samples + share[0], failed + share[1]
    assert (samples, failed) == (NUM_IMAGES, len(BAD) + (dataset.reader is None))


def test_cached_images_are_read_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is left of the files, and each that was bad is named once, in training and evaluation."""
    dataset = open_images(tmp_path)
    with (
        closing(PillowBackend(1, 64)) as backend,
        closing(fill_cache(dataset, create_store(dataset), 1)) as cache,
    ):
        assert cache.size == SIZE and cache.pixels.nbytes == bytes_needed(dataset) == NUM_IMAGES * 40 * 52 * 3
        expected = list(Loader(backend, PREPROCESSING).eval(dataset, micro_batch=16))
        shutil.rmtree(tmp_path / "train")
        caplog.clear()
        loader = Loader(backend, PREPROCESSING, caches=(cache,))
        with caplog.at_level(logging.INFO, "data_pipeline"):
            assert count_equal(loader.eval(dataset, micro_batch=16), expected) == (NUM_IMAGES, len(BAD))
            for _ in loader.train(dataset, Augment(), seed=1, global_batch=NUM_IMAGES // 2, num_steps=4):
                pass
    assert sorted(caplog.messages) == sorted(
        f"left out {failure.path}: {failure.reason}" for batch in expected for failure in batch.failures
    )


def test_attached_cache_gives_the_same_batches(dataset: Dataset, cache: DecodedCache) -> None:
    """As another rank has it: a mapping that cannot be written to."""
    assert cache.store is not None
    with (
        closing(await_cache(dataset, PixelStore.attach(cache.store.address))) as other,
        closing(PillowBackend(1, 64)) as backend,
    ):
        assert not other.pixels.flags.writeable and other.reasons == cache.reasons
        streams = (
            Loader(backend, PREPROCESSING, caches=(one,)).train(
                dataset, AUGMENTS["random_resized, colours"], seed=1, global_batch=64, num_steps=2
            )
            for one in (other, cache)
        )
        assert count_equal(*streams)[0] == 128


@pytest.mark.parametrize("max_pixels", [2080, 2079])
def test_limit_of_pixels_is_that_of_the_uncached(max_pixels: int, dataset: Dataset) -> None:
    preprocessing = Preprocessing(resize_px=36, crop_px=32, max_pixels=max_pixels)
    with (
        closing(fill_cache(dataset, create_store(dataset), 1, max_pixels)) as cache,
        closing(PillowBackend(1, 64)) as backend,
    ):
        loaders = (Loader(backend, preprocessing, caches=(cache,)), Loader(backend, preprocessing))
        _, failed = count_equal(*(loader.eval(dataset, micro_batch=64) for loader in loaders))
        turned = [reason for reason in cache.reasons.values() if reason.startswith("52 x 40")]
        assert (failed == NUM_IMAGES, bool(turned)) == ((True, True) if max_pixels < 2080 else (False, False))
        if turned:
            assert turned[0] == "52 x 40 pixels are above the limit of 2079"
            assert "40 x 52 pixels are above the limit of 2079" in cache.reasons.values()


def test_file_that_has_changed_is_left_out(tmp_path: Path) -> None:
    """After it was looked at, and before it is decoded; what is not decoded takes no memory."""
    dataset = open_images(tmp_path)
    for place, content in enumerate([encode(photo(52, 40), "PNG"), huge_png(), broken(*SIZE)["jpeg, half"]]):
        dataset.path_at(place).write_bytes(content)
    with closing(fill_cache(dataset, create_store(dataset), 1)) as cache:
        assert cache.reasons[0] == "40 x 52 pixels, where all others have 52 x 40"
        assert cache.reasons[1] == "30000 x 30000 pixels are above the limit of 100000000"
        assert cache.reasons[2].startswith("truncated JPEG")
        assert not cache.valid[:3].any() and not cache.pixels[:3].any() and cache.valid[3]


def test_only_images_of_one_size_are_kept(tmp_path: Path) -> None:
    dataset = open_images(tmp_path)
    assert image_size(dataset) == SIZE  # bad files have no size, or the one of the others
    assert image_size(load_image_folder(tmp_path, "train")) is None  # nobody has looked
    assert dataset.table is not None
    bad = dataset.take(np.flatnonzero(dataset.table.kinds == 0))
    assert len(bad) > 1 and image_size(bad) is None and bytes_needed(bad) is None
    for content in (encode(photo(52, 40), "PNG"), encode(photo(40, 53), "JPEG"), huge_png()):
        dataset.path_at(4).write_bytes(content)
        looked = with_table(load_image_folder(tmp_path, "train"), 1)
        assert image_size(looked) is None and bytes_needed(looked) is None


@pytest.mark.slow
def test_processes_decode_what_one_does(
    dataset: Dataset, cache: DecodedCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("data_pipeline.loading.scan.MANY", 1)
    monkeypatch.setattr(cache_module, "_CHUNK_BYTES", 20 * 40 * 52 * 3)  # four chunks
    with closing(fill_cache(dataset, create_store(dataset), 2)) as other:
        assert np.array_equal(other.pixels, cache.pixels) and np.array_equal(other.valid, cache.valid)
        assert other.reasons == cache.reasons and len(cache.reasons) >= len(BAD)
    assert caplog.messages == []


def die(size: tuple[int, int], max_pixels: int, chunk: Chunk) -> None:
    """In place of decoding."""
    os.kill(os.getpid(), 9)


@pytest.mark.slow
def test_killed_worker_ends_every_rank_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_images(tmp_path)
    monkeypatch.setattr("data_pipeline.loading.scan.MANY", 1)
    monkeypatch.setattr(cache_module, "_CHUNK", 20)
    monkeypatch.setattr(cache_module, "_decode_chunk", die)
    message = (
        "^a process that decodes the images of train was killed, for lack of memory perhaps: "
        r"set data\.cache to none$"
    )
    with closing(create_store(dataset)) as store, closing(PixelStore.attach(store.address)) as other:
        with pytest.raises(WorkerError, match=message):
            fill_cache(dataset, store, 2)
        with pytest.raises(WorkerError, match=message):
            await_cache(dataset, other)
