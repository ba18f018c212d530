"""Batches: the same stream for any ranks and restarts, bad files isolated, threads gone at the end."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.image_folder import load_image_folder
from data_pipeline.decode.backend import ImageBackend, make_backend
from data_pipeline.decode.pillow import Decoded
from data_pipeline.loader import Loader
from data_pipeline.loading.bad_files import FaultLog
from data_pipeline.loading.batches import Batch
from data_pipeline.loading.scan import with_table
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.crop import CropParams
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.sampler import order_at
from tests.helpers.images import broken, encode, photo, write_folder

PREPROCESSING = Preprocessing(resize_px=36, crop_px=32)


@pytest.fixture(scope="module", params=["dali", "pillow"])
def backend(request: pytest.FixtureRequest) -> Iterator[ImageBackend]:
    made = make_backend(request.param, device="cpu", preprocessing=PREPROCESSING, max_batch=16, num_threads=2)
    yield made
    made.close()


@pytest.fixture(params=["known", "unknown"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """29 images of three classes, a number that nothing divides; with and without a sample table."""
    root = tmp_path_factory.mktemp("data")
    write_folder(root / "train", {"a": 11, "b": 9, "c": 9})
    found = load_image_folder(root, "train")
    return with_table(found, 1) if request.param == "known" else found


def stream(
    dataset: Dataset, backend: ImageBackend, loading: dict[str, Any] | None = None, **options: Any
) -> Generator[Batch, None, None]:
    loader = Loader(backend, PREPROCESSING, **loading or {})
    return loader.train(dataset, Augment(), seed=3, global_batch=8, **options)


def by_step(batches: Iterator[Batch]) -> dict[int, tuple[list[int], bytes]]:
    """The samples and the pixels of each step."""
    steps: dict[int, tuple[list[int], bytes]] = {}
    for batch in batches:
        indices, pixels = steps.get(batch.step, ([], b""))
        steps[batch.step] = (indices + batch.indices.tolist(), pixels + batch.images.tobytes())
    return steps


@pytest.mark.parametrize(("world_size", "balance"), [(1, 0.0), (2, 1.0), (3, 0.0), (5, 0.0)])
def test_ranks_together_see_the_stream_of_one_rank(
    dataset: Dataset, backend: ImageBackend, world_size: int, balance: float
) -> None:
    options: dict[str, Any] = {"num_steps": 7, "balance": balance}
    whole = by_step(stream(dataset, backend, **options))
    shares = [
        by_step(stream(dataset, backend, rank=rank, world_size=world_size, micro_batch=2, **options))
        for rank in range(world_size)
    ]
    assert list(whole) == list(range(7))
    for step, (indices, pixels) in whole.items():
        assert [i for share in shares for i in share[step][0]] == indices
        assert b"".join(share[step][1] for share in shares) == pixels
    first_epoch = [i for step in range(3) for i in whole[step][0]]
    assert first_epoch == order_at(3, 0, dataset.labels, balance)[:24].tolist()
    assert (len(set(first_epoch)) == 24) is (balance == 0)
    assert first_epoch != [i for step in range(3, 6) for i in whole[step][0]]


@pytest.mark.parametrize("start_step", [1, 2, 3, 6])
def test_resumed_stream_is_the_tail_of_the_whole(
    dataset: Dataset, backend: ImageBackend, start_step: int
) -> None:
    balance = 1.0 if start_step == 2 else 0.0
    whole = by_step(stream(dataset, backend, num_steps=8, balance=balance))
    tail = by_step(stream(dataset, backend, start_step=start_step, num_steps=8 - start_step, balance=balance))
    assert tail == {step: whole[step] for step in range(start_step, 8)}


def test_stream_does_not_depend_on_threads(dataset: Dataset, backend: ImageBackend) -> None:
    one = by_step(stream(dataset, backend, {"read_threads": 1, "prefetch": 1}, num_steps=4))
    many = by_step(stream(dataset, backend, {"read_threads": 8, "prefetch": 5}, num_steps=4))
    assert one == many


def test_micro_batches_mark_the_end_of_a_step(dataset: Dataset, backend: ImageBackend) -> None:
    batches = list(stream(dataset, backend, num_steps=2, micro_batch=3))
    assert [(b.step, len(b), b.last) for b in batches] == [
        (0, 3, False),
        (0, 3, False),
        (0, 2, True),
        (1, 3, False),
        (1, 3, False),
        (1, 2, True),
    ]
    assert all(b.images.dtype == np.uint8 and b.images.shape == (len(b), 32, 32, 3) for b in batches)
    assert all(b.labels.tolist() == dataset.labels[b.indices].tolist() for b in batches)
    assert all(b.valid.all() and not b.failures for b in batches)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 40])
def test_evaluation_counts_every_sample_once(
    dataset: Dataset, backend: ImageBackend, world_size: int
) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        loader = Loader(backend, PREPROCESSING)
        for batch in loader.eval(dataset, micro_batch=4, rank=rank, world_size=world_size):
            assert tuple(batch.paths) == tuple(dataset.path_at(i) for i in batch.indices)
            seen += batch.indices.tolist()
    assert seen == list(range(29))


def test_bad_files_are_logged_once_and_lose_no_neighbours(
    tmp_path: Path, backend: ImageBackend, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "train", {"a": 8, "b": 8})
    clean = load_image_folder(tmp_path, "train")
    augment = Augment()
    options: dict[str, Any] = {"seed": 1, "global_batch": 16}
    want = next(iter(Loader(backend, PREPROCESSING).train(clean, augment, **options, num_steps=1)))

    bad = {clean.path_at(2 * i): data for i, data in enumerate(list(broken().values())[:6])}
    for path, data in bad.items():
        path.write_bytes(data)
    vanished = clean.path_at(15)
    vanished.unlink()
    faults = FaultLog()
    loader = Loader(backend, PREPROCESSING, faults=faults)
    with caplog.at_level(logging.WARNING, "data_pipeline"):
        batches = list(loader.train(clean, augment, **options, num_steps=3))
    got = batches[0]
    valid = [path not in bad and path != vanished for path in got.paths]
    assert got.valid.tolist() == valid and sum(valid) == 9
    assert np.array_equal(got.images[got.valid], want.images[got.valid])
    assert not got.images[~got.valid].any()
    assert [failure.path for failure in got.failures] == [
        str(path) for path, ok in zip(got.paths, valid, strict=True) if not ok
    ]
    assert all(len(batch.failures) == 7 for batch in batches)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(set(messages)) == len(faults) == 7
    assert f"left out {vanished}: cannot be read: No such file or directory" in messages
    assert any("truncated JPEG" in message for message in messages)


def test_huge_image_header_allocates_no_memory(tmp_path: Path, backend: ImageBackend) -> None:
    (tmp_path / "bomb.png").write_bytes(broken()["png of 30000 x 30000"])
    (batch,) = Loader(backend, PREPROCESSING).predict([tmp_path / "bomb.png"], micro_batch=4)
    assert batch.failures[0].reason == "30000 x 30000 pixels are above the limit of 100000000"


def test_prediction_batches_keep_the_input_order(tmp_path: Path, backend: ImageBackend) -> None:
    paths = []
    for i in range(10):
        paths.append(tmp_path / f"{9 - i}.jpg")
        paths[-1].write_bytes(b"no image" if i == 4 else encode(photo(40, 50, seed=i), "JPEG"))
    batches = list(Loader(backend, PREPROCESSING).predict(paths, micro_batch=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [path for batch in batches for path in batch.paths] == paths
    assert [i for batch in batches for i in batch.indices] == list(range(10))
    assert [i for batch in batches for i in batch.indices[~batch.valid]] == [4]
    assert {int(label) for batch in batches for label in batch.labels} == {-1}


def test_prediction_paths_are_consumed_lazily(tmp_path: Path, backend: ImageBackend) -> None:
    (tmp_path / "x.jpg").write_bytes(encode(photo(40, 50), "JPEG"))
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield tmp_path / "x.jpg"

    batches = Loader(backend, PREPROCESSING, prefetch=2).predict(endless(), micro_batch=2)
    assert [len(batch) for batch in islice(batches, 3)] == [2, 2, 2]
    time.sleep(0.3)
    assert taken <= 2 * (3 + 2 + 1 + 5 + 1)
    batches.close()


def test_closing_a_stream_ends_its_threads(dataset: Dataset, backend: ImageBackend) -> None:
    assert loader_threads() == []
    batches = stream(dataset, backend)
    next(batches)
    started = {name.split("_")[0] for name in loader_threads()}
    batches.close()
    by_python = dataset.table is None or not backend.takes_feeds
    assert started == {"prefetch", "decode"} | ({"read"} if by_python else set())
    assert loader_threads() == []
    list(stream(dataset, backend, num_steps=1))
    assert loader_threads() == []


def loader_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("prefetch", "read", "decode"))]


@pytest.mark.slow
def test_closing_behind_the_last_request_waits_for_the_decoder(dataset: Dataset) -> None:
    class Slow:
        name, device, max_batch, takes_feeds = "slow", "cpu", 16, False
        running = 0

        def decode(self, encoded: Sequence[bytes | None], crops: CropParams) -> Decoded:
            Slow.running += 1
            time.sleep(1.0 if Slow.running == 1 else 2.5)  # the second, for longer than a pipe is waited for
            Slow.running -= 1
            return Decoded(np.zeros((len(encoded), 32, 32, 3), np.uint8))

        def close(self) -> None: ...

    batches = stream(dataset, Slow(), num_steps=2)
    next(batches)
    batches.close()
    assert Slow.running == 0 and loader_threads() == []  # the backend may be closed now


def test_background_error_reaches_the_consumer(dataset: Dataset) -> None:
    class Broken:
        name, device, max_batch, takes_feeds = "broken", "cpu", 16, False

        def decode(self, encoded: Sequence[bytes | None], crops: CropParams) -> Decoded:
            raise RuntimeError("out of memory")

        def close(self) -> None: ...

    with pytest.raises(RuntimeError, match="out of memory"):
        next(stream(dataset, Broken()))
    assert not loader_threads()


def test_batch_sizes_out_of_range_are_refused_at_once(dataset: Dataset, backend: ImageBackend) -> None:
    loader, augment = Loader(backend, PREPROCESSING), Augment()
    with pytest.raises(UserError, match="global_batch 30 is larger than the training set of 29 images"):
        loader.train(dataset, augment, seed=0, global_batch=30)
    with pytest.raises(UserError, match="global_batch 2 is smaller than the number of ranks, 3"):
        loader.train(dataset, augment, seed=0, global_batch=2, world_size=3)
    with pytest.raises(ValueError, match="micro_batch 24 is above the backend's max_batch 16"):
        loader.train(dataset, augment, seed=0, global_batch=24)


def test_pipeline_import_loads_neither_torch_nor_dali() -> None:
    program = (
        "import sys, data_pipeline.loader, data_pipeline.datasets.demo\n"
        "print([name for name in ('torch', 'nvidia.dali', 'numba', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_batches_of_a_pipe_come_before_its_end(tmp_path: Path, backend: ImageBackend) -> None:
    (tmp_path / "x.jpg").write_bytes(encode(photo(40, 50), "JPEG"))
    more = threading.Event()

    def piped() -> Iterator[Path]:
        yield from [tmp_path / "x.jpg"] * 3
        more.wait(30)  # as a pipe that stays open

    batches = Loader(backend, PREPROCESSING).predict(piped(), micro_batch=1)
    assert [len(batch) for batch in islice(batches, 3)] == [1, 1, 1]
    started = time.monotonic()
    batches.close()  # as Ctrl-C does
    assert time.monotonic() - started < 10
    more.set()
    for thread in threading.enumerate():
        if thread.name == "prefetch":
            thread.join(10)
    assert loader_threads() == []
