"""The kept table is used for the samples that it is of, and for no others; never when damaged or crafted."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.datasets import table_cache
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.image_folder import load_image_folder
from data_pipeline.datasets.open import open_dataset
from data_pipeline.datasets.sample_table import SampleTable
from data_pipeline.datasets.table_cache import load_rows, load_table, save_table
from data_pipeline.loading.scan import with_table
from tests.helpers.images import encode, photo, write_folder
from tests.helpers.layouts import touch


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "train", {"a": 3, "b": 2}, side=16)
    return tmp_path


def table_of(dataset: Dataset) -> SampleTable:
    """Right lengths, and sizes that no look would find: so that a test knows where a table comes from."""
    count = len(dataset)
    lengths = [len(dataset.read(i)) for i in range(count)]
    return SampleTable.from_columns(
        lengths=lengths, heights=[77] * count, widths=range(1, count + 1), kinds=[1] * count,
        orientations=[1] * count, direct=[1] * count,
    )  # fmt: skip


def keep(root: Path) -> tuple[Dataset, Path]:
    dataset = load_image_folder(root, "train")
    save_table(dataset, table_of(dataset), time.time_ns())
    return dataset, root / ".alexnet" / "table-train.bin"


def test_kept_table_is_attached_where_the_data_is_opened(folder: Path) -> None:
    keep(folder)
    opened = open_dataset(folder, "train", min_cached=1)
    assert opened.table is not None and opened.table.sizes.tolist() == [[77, n] for n in range(1, 6)]
    assert open_dataset(folder, "train", min_cached=6).table is None


def test_exclude_list_takes_rows_of_the_kept_table(folder: Path) -> None:
    keep(folder)
    for excluded, widths in (({"a/001.jpg"}, [1, 3, 4, 5]), ({"a/000.jpg", "b/001.jpg"}, [2, 3, 4])):
        lines = (f'{{"path": "train/{name}", "reason": "x"}}\n' for name in excluded)
        (folder / "quarantine.jsonl").write_text("".join(lines))
        opened = open_dataset(folder, "train", min_cached=1)
        assert opened.table is not None and opened.table.sizes[:, 1].tolist() == widths
        assert opened.table.lengths.tolist() == [len(opened.read(i)) for i in range(len(opened))]


CHANGES: dict[str, Callable[[Path], object]] = {
    "added": lambda folder: touch(folder / "a" / "new.jpg"),
    "removed": lambda folder: (folder / "a" / "000.jpg").unlink(),
    "renamed": lambda folder: (folder / "a" / "000.jpg").rename(folder / "a" / "zzz.jpg"),
    "moved": lambda folder: (folder / "a" / "002.jpg").rename(folder / "b" / "2.jpg"),
    "class renamed": lambda folder: (folder / "a").rename(folder / "x"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_table_of_other_samples_is_not_used(folder: Path, change: str) -> None:
    keep(folder)
    assert load_table(load_image_folder(folder, "train")) is not None
    CHANGES[change](folder / "train")
    assert load_table(load_image_folder(folder, "train")) is None


def test_rows_of_files_that_are_still_there_are_used_again(folder: Path) -> None:
    write_folder(folder / "train", {"a": 9, "b": 9, "c": 2}, side=16)
    keep(folder)
    (folder / "train" / "a" / "004.jpg").unlink()
    write_folder(folder / "train", {"a0": 2}, side=24)
    (folder / "train" / "c" / "002.jpg").write_bytes(encode(photo(30, 20), "JPEG"))
    dataset = load_image_folder(folder, "train")
    table = with_table(dataset, 1, min_cached=1).table
    assert table is not None
    seen = dict(zip(dataset.paths, table.sizes.tolist(), strict=True))
    new = {name for name, (height, _) in seen.items() if height != 77}
    assert new == {"a0/000.jpg", "a0/001.jpg", "c/002.jpg"}
    assert seen["a0/001.jpg"][0] == 24 and seen["b/000.jpg"] == [77, 10] and seen["a/005.jpg"] == [77, 6]
    assert (again := load_table(dataset)) is not None and again.sizes.tolist() == table.sizes.tolist()
    assert load_rows(load_image_folder(folder, "train").take(np.array([0, 3]))) is not None


def test_table_of_rewritten_files_is_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset, _ = keep(folder)
    path = dataset.path_at(3)
    whole, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(whole + b"x")
    os.utime(path, ns=times)
    with caplog.at_level(logging.INFO, "data_pipeline"):
        assert load_table(dataset) is None  # its length
    path.write_bytes(whole)
    os.utime(path, ns=times)
    assert load_table(dataset) is not None
    os.utime(path, ns=(times[0], time.time_ns()))
    assert load_table(dataset) is None  # its time
    path.unlink()
    assert load_table(dataset) is None
    assert caplog.messages == ["files of train were changed since the sample table was made: it is not used"]


def test_file_that_could_not_be_read_may_be_missing(folder: Path) -> None:
    dataset = load_image_folder(folder, "train")
    dataset.path_at(2).unlink()
    lengths = np.array([1, 1, 0, 1, 1]) * [len(dataset.read(0 if i == 2 else i)) for i in range(5)]
    table = SampleTable.from_columns(
        lengths=lengths, heights=[1] * 5, widths=[1] * 5, kinds=[0] * 5, orientations=[1] * 5, direct=[0] * 5
    )
    save_table(dataset, table, time.time_ns())
    assert load_table(dataset) is not None


def test_table_that_is_damaged_or_crafted_is_not_used(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, path = keep(folder)
    whole = path.read_bytes()
    assert len(whole) == 32 + 56 + 5 * (19 + 8)
    head, names = whole[32:88], whole[-40:]
    rows = whole[88:-40]
    with caplog.at_level(logging.INFO, "data_pipeline"):
        for damaged in (b"", whole[:-1], whole[:100] + b"?" + whole[101:]):
            path.write_bytes(damaged)
            assert load_table(dataset) is None
        crafted = [rows[:-1] + b"\2", rows[:-10] + b"\xff" + rows[-9:]]
        for body in (head[:-1], head + rows, *(head + row + names for row in crafted)):
            path.write_bytes(hashlib.sha256(body).digest() + body)
            assert load_table(dataset) is None
    stem = f"the sample table in {path} is damaged and not used: "
    assert caplog.messages == [stem + "its hash is wrong"] * 3 + [
        stem + "it is of another length than it says",
        stem + "what DALI may read is not within 0..1",
        stem + "an orientation is not within 1..8",
    ]
    save_table(dataset, table_of(dataset), time.time_ns() + 10**12)
    assert load_table(dataset) is None  # made in the future
    save_table(dataset, table_of(dataset), time.time_ns())
    assert load_table(dataset) is not None
    monkeypatch.setattr(table_cache, "VERSION", table_cache.VERSION + 1)
    assert load_table(dataset) is None


def test_kept_table_must_be_a_regular_file(folder: Path) -> None:
    dataset, path = keep(folder)
    path.unlink()
    os.mkfifo(path)  # reading it would wait for ever
    assert load_table(dataset) is None


def test_table_goes_to_the_users_cache_beside_read_only_data(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / ".alexnet").write_text("a file where the folder would be")  # as root, modes forbid nothing
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    dataset = load_image_folder(folder, "train")
    save_table(dataset, table_of(dataset), time.time_ns())
    (kept,) = (folder / "cache").rglob("*.bin")
    assert kept.name == "table-train.bin" and load_table(dataset) is not None
    (folder / "cache").rename(folder / "gone")
    (folder / "cache").write_text("neither here")
    with caplog.at_level(logging.INFO, "data_pipeline"):
        save_table(dataset, table_of(dataset), time.time_ns())
    assert caplog.messages == [
        "the sample table could not be kept: neither the data folder nor the user's cache can be written"
    ]
    assert load_table(dataset) is None


def test_table_of_foreign_shards_follows_each_shard(shards: Path, tmp_path: Path) -> None:
    for path in sorted((shards / "train").glob("*.tar"))[:2]:
        (tmp_path / f"train-{path.name}").write_bytes(path.read_bytes())
    dataset = open_dataset(tmp_path, "train", min_cached=1)
    assert dataset.table is None and dataset.reader is not None
    empty = [i for i, size in enumerate(dataset.reader.sizes) if not size]
    table = table_of(dataset.take(np.delete(np.arange(len(dataset)), empty)))
    dataset = dataset.take(np.delete(np.arange(len(dataset)), empty))
    save_table(dataset, table, time.time_ns())
    assert load_table(dataset) is not None
    reader = dataset.reader
    assert reader is not None
    other = replace(dataset, reader=replace(reader, offsets=reader.offsets + 512))
    assert load_table(other) is None
    shard = tmp_path / reader.shards[0]
    content, times = shard.read_bytes(), (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    shard.write_bytes(content)  # the same names and places, at another time
    os.utime(shard, ns=(times[0], times[1] + 1))
    assert load_table(dataset) is None
    os.utime(shard, ns=times)
    assert load_table(dataset) is not None
    shard.write_bytes(content + bytes(512))
    os.utime(shard, ns=times)
    assert load_table(dataset) is None
