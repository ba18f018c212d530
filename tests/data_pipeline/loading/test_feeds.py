"""The fast way: batches of known files, of which none is touched by Python; and what leaves it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest

from data_pipeline.datasets.image_folder import load_image_folder
from data_pipeline.datasets.open import open_dataset
from data_pipeline.decode import dali as dali_module
from data_pipeline.decode.dali import DaliBackend
from data_pipeline.decode.feed import Feed
from data_pipeline.decode.pillow import Decoded
from data_pipeline.loader import Loader
from data_pipeline.loading.bad_files import FaultLog
from data_pipeline.loading.batches import Batch
from data_pipeline.loading.feeds import FeedMaker
from data_pipeline.loading.readers import Reader
from data_pipeline.loading.scan import with_table
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.crop import CropParams, eval_crop_params
from tests.helpers.feed_batches import PREPROCESSING, STEPS, pixels, train
from tests.helpers.images import as_numpy, broken, encode, kinds, photo, write_folder


@pytest.fixture(scope="module", params=["window", "whole", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[DaliBackend]:
    """DALI as on a CPU; the GPU's graph, on the CPU; the GPU."""
    where: Literal["cpu", "gpu"] = "gpu" if request.param == "gpu" else "cpu"
    whole = request.param != "window"
    made = DaliBackend(where, 0, PREPROCESSING.crop_px, 16, 2, whole_graph=whole, deterministic=True)
    yield made
    made.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_folder(tmp_path / "train", {"a": 24, "b": 24})
    return tmp_path


Unspoiled = tuple[list[list[Path]], npt.NDArray[np.int64]]


@pytest.fixture(scope="module")
def unspoiled(backend: DaliBackend, tmp_path_factory: pytest.TempPathFactory) -> Unspoiled:
    """Of good files as in `root`: the paths of each step below that, and all pixels."""
    folder = tmp_path_factory.mktemp("good")
    write_folder(folder / "train", {"a": 24, "b": 24})
    batches = train(with_table(open_dataset(folder, "train"), 1), backend)
    return [[path.relative_to(folder) for path in batch.paths] for batch in batches], pixels(batches)


def assert_same(got: list[Batch], want: npt.NDArray[np.int64], backend: DaliBackend) -> None:
    """The same pixels: to the bit on a CPU; on a GPU, whose decoder is not libjpeg, nearly."""
    assert np.abs(pixels(got) - want).max() <= (5 if backend.device == "gpu" else 0)


def spoil(path: Path, how: str) -> None:
    """Change a file after it was looked at."""
    data = path.read_bytes()
    bomb = broken()["png of 30000 x 30000"]
    changed = {
        "bits, same length": data[:300] + bytes(len(data) - 300),
        "cut off": data[: len(data) // 2],
        "emptied": b"",
        "png of 30000 x 30000": bomb,
        "the same in as many bytes": bomb + bytes(len(data) - len(bomb)),
        "text": b"no image",
    }
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(changed[how])


SPOILED = {
    "bits, same length": "damaged JPEG",
    "cut off": "truncated JPEG",
    "emptied": "empty file",
    "png of 30000 x 30000": "30000 x 30000 pixels are above the limit",
    "the same in as many bytes": "30000 x 30000 pixels are above the limit",
    "text": "not an image",
    "removed": "No such file",
}


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("step", [0, 1, 2])
def test_bad_file_in_flight_leaves_its_neighbours(
    root: Path, backend: DaliBackend, unspoiled: Unspoiled, step: int, how: str
) -> None:
    paths, want = unspoiled
    dataset, victim = with_table(open_dataset(root, "train"), 1), root / paths[step][2]
    spoil(victim, how)
    got = train(dataset, backend)
    failed = [(batch.step, int(place)) for batch in got for place in np.flatnonzero(~batch.valid)]
    assert failed == [(step, 2)]
    assert SPOILED[how] in got[step].failures[0].reason and got[step].failures[0].path == str(victim)
    expected = want.copy()
    expected[4 * step + 2] = 0
    assert_same(got, expected, backend)


def test_bad_file_costs_one_slow_batch_and_no_more(
    root: Path, backend: DaliBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = with_table(open_dataset(root, "train"), 1)
    slow: list[int] = []
    decode = backend.decode

    def counted(encoded: Sequence[bytes | None], crops: CropParams) -> Decoded:
        slow.append(len(encoded))
        return decode(encoded, crops)

    monkeypatch.setattr(backend, "decode", counted)
    train(dataset, backend)
    assert not slow
    spoil(dataset.path_at(7), "bits, same length")
    batches = train(dataset, backend, num_steps=5 * STEPS)
    assert sum(not batch.valid.all() for batch in batches) == 5
    assert 1 <= len(slow) <= 2  # the next epoch's batch may have been planned when the first was refused


def test_file_of_another_size_is_cropped_by_its_own(root: Path, backend: DaliBackend) -> None:
    dataset = with_table(open_dataset(root, "train"), 1)
    for index, size in ((3, (36, 70)), (30, (90, 44))):
        path = dataset.path_at(index)
        before, after = path.stat().st_size, encode(photo(*size).convert("L"), "JPEG", quality=1)
        assert len(after) < before
        path.write_bytes(after + bytes(before - len(after)))  # nobody sees it from the length
    got = train(dataset, backend)
    assert all(batch.valid.all() for batch in got)
    assert_same(got, pixels(train(load_image_folder(root, "train"), backend)), backend)


def test_files_that_dali_does_not_read_are_among_the_others(
    tmp_path: Path, backend: DaliBackend, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "train", {"a": 24, "b": 24})
    unlike = kinds()
    for number, (name, data) in enumerate(unlike.items()):
        suffix = name.split()[0].replace("jpeg", "jpg")
        (tmp_path / "train" / "b" / f"x{number}.{suffix}").write_bytes(data)
    unknown = load_image_folder(tmp_path, "train")
    known = with_table(unknown, 1)
    assert known.table is not None and 3 < (~known.table.direct).sum() < len(unlike)
    with caplog.at_level(logging.INFO, "data_pipeline"):
        got = train(known, backend)
    assert sum("Pillow decodes those" in message for message in caplog.messages) == 1
    want = train(unknown, backend)
    assert_same(got, pixels(want), backend)
    assert all(batch.valid.all() for batch in chain(got, want))


def test_good_files_leave_no_line_on_stderr(
    tmp_path: Path, backend: DaliBackend, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, (name, data) in enumerate(kinds().items()):
        path = tmp_path / "train" / "ab"[number % 2] / f"{number}.{name.split()[0].replace('jpeg', 'jpg')}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    for dataset in (
        load_image_folder(tmp_path, "train"),
        with_table(load_image_folder(tmp_path, "train"), 1),
    ):
        assert all(batch.valid.all() for batch in train(dataset, backend, num_steps=16))
    assert capfd.readouterr().err == ""


def test_shards_give_the_pixels_of_their_files(files: Path, shards: Path, backend: DaliBackend) -> None:
    batches = {}
    for folder, table in ((files, False), (files, True), (shards, True)):
        dataset = open_dataset(folder, "train")
        dataset = with_table(dataset, 1) if table else replace(dataset, table=None)
        batches[folder, table] = train(dataset, backend)
    want = batches.pop((files, False))
    for got in batches.values():
        assert_same(got, pixels(want), backend)
        assert [batch.valid.tolist() for batch in got] == [batch.valid.tolist() for batch in want]
        assert [failure.reason for batch in got for failure in batch.failures][:1] == ["empty file"]


def test_damaged_shard_member_is_one_failure(copy: Path, backend: DaliBackend) -> None:
    dataset = open_dataset(copy, "train")
    want = train(dataset, backend)
    bad = int(want[1].indices[1])
    assert dataset.reader is not None
    shard = copy / dataset.reader.shards[int(dataset.reader.shard_of[bad])]
    with shard.open("r+b") as file:
        file.seek(int(dataset.reader.offsets[bad]) - 400)
        file.write(b"\xff")
    got = train(dataset, backend)
    assert not got[1].valid[1] and "do not fit each other" in got[1].failures[0].reason
    keep = np.flatnonzero(np.concatenate([batch.valid for batch in got]))
    assert len(keep) >= 4 * STEPS - 4
    expected = np.where(np.isin(np.arange(4 * STEPS), keep)[:, None, None, None], pixels(want), 0)
    assert_same(got, expected, backend)


@pytest.mark.slow
def test_decoded_bytes_in_flight_are_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    large = encode(photo(2000, 2500), "JPEG", quality=30)
    for number in range(8):
        path = tmp_path / "train" / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(large if number < 5 else encode(photo(60, 80, seed=number), "JPEG"))
    dataset = with_table(open_dataset(tmp_path, "train"), 1)
    decoded: list[int] = []

    class Counting(DaliBackend):
        def decode_fast(self, plan: Callable[[], Feed]) -> object | None:
            feed = plan()
            decoded.append(3 * int(feed.sizes.prod(axis=1).sum()))
            return super().decode_fast(lambda: feed)

    images = {}
    for gigabytes in (0.5, 0.125):
        backend = Counting("cpu", 0, 32, 16, 2, whole_graph=True, max_decoded_bytes=int(gigabytes * 1e9))
        with caplog.at_level(logging.INFO, "data_pipeline"):
            loader = Loader(backend, PREPROCESSING)
            (batch,) = loader.train(dataset, Augment(), seed=1, global_batch=8, num_steps=1)
        images[gigabytes] = as_numpy(batch.images)
        backend.close()
    assert 7.5e7 < decoded[0] < 12.5e7 and decoded[1] <= 0.125e9 / (dali_module.DEPTH + 1)
    assert caplog.messages == [
        "the images of a batch decode to more than 0.031 GB: the largest are cut on the CPU, more slowly "
        "(data.max_decoded_gb)",
        "3 large images were cut on the CPU",
    ]
    assert np.abs(images[0.5] - images[0.125])[:, 1:-1, 1:-1].max() <= 1


def test_large_file_that_changed_is_cut_by_its_own_size(root: Path) -> None:
    dataset = with_table(open_dataset(root, "train"), 1)
    path = dataset.path_at(3)
    path.write_bytes(encode(photo(90, 44, seed=3), "JPEG"))
    indices = np.array([2, 3])
    with closing(Reader(1, 10**6, FaultLog())) as reader:
        made = FeedMaker(reader).make(
            dataset, indices, partial(eval_crop_params, preprocessing=PREPROCESSING), max_batch_bytes=1
        )
    assert dataset.table is not None
    want = eval_crop_params([dataset.table.sizes[2], (90, 44)], PREPROCESSING)
    assert not made.failures and made.feed.sizes.tolist() == want.sizes.tolist()
    assert made.feed.crops.windows.tolist() == [[0, 0, *size] for size in want.sizes.tolist()]
    assert made.feed.crops.offsets.tolist() == want.offsets.tolist()


def test_deterministic_decoding_gives_the_same_bytes_twice(root: Path, backend: DaliBackend) -> None:
    dataset = with_table(open_dataset(root, "train"), 1)
    where: Literal["cpu", "gpu"] = "gpu" if backend.device == "gpu" else "cpu"
    runs = []
    for _ in range(2):
        made = DaliBackend(where, 0, 32, 16, 2, whole_graph=True, deterministic=True)
        runs.append(pixels(train(dataset, made)))
        made.close()
    assert np.array_equal(runs[0], runs[1])
