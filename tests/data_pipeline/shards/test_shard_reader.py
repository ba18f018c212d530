"""Views of mapped shards are the bytes that `read` gives; damage is left to `read`, which says why."""

from __future__ import annotations

import io
import logging
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.common.errors import ImageError
from data_pipeline.datasets.open import open_dataset
from data_pipeline.shards.shard_reader import ShardReader

LIMIT = 10**9


def reader_of(root: Path) -> ShardReader:
    reader = open_dataset(root, "train").reader
    assert reader is not None
    return reader


def everything(reader: ShardReader) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.arange(len(reader.sizes), dtype=np.int64)


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def num_mapped(root: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(root))


def test_views_are_the_bytes_that_read_gives(copy: Path) -> None:
    reader = reader_of(copy)
    before = num_open_files()
    order = np.random.default_rng(1).permutation(everything(reader))
    views, valid = reader.views(order)
    assert num_open_files() == before and num_mapped(copy) == len(reader.shards)
    for i, view, is_valid in zip(order.tolist(), views, valid.tolist(), strict=True):
        assert view.dtype == np.uint8 and not view.flags.writeable
        if reader.sizes[i]:
            assert is_valid and view.tobytes() == reader.read(i, LIMIT)
        else:
            assert not is_valid and not len(view)
            with pytest.raises(ImageError, match="empty file"):
                reader.read(i, LIMIT)
    assert valid.sum() == len(reader.sizes) - 1
    none, no_flags = reader.views(order[:0])
    assert none == [] and no_flags.tolist() == []
    reader.read_ahead(order)
    del reader
    assert num_mapped(copy) > 0 and views[3].tobytes()  # a view keeps what it shows
    del views, view
    assert num_mapped(copy) == 0


def test_reader_maps_anew_in_another_process(copy: Path) -> None:
    reader = reader_of(copy)
    views, _ = reader.views(everything(reader))
    again = pickle.loads(pickle.dumps(reader))
    other, valid = again.views(everything(reader))
    assert [view.tobytes() for view in other] == [view.tobytes() for view in views] and valid.any()
    assert num_mapped(copy) == 2 * len(reader.shards)


def test_flipped_header_byte_is_left_to_read(copy: Path) -> None:
    reader = reader_of(copy)
    shard = copy / reader.shards[int(reader.shard_of[5])]
    for at in (0, 100, 125, 150, 156, 511):
        whole = shard.read_bytes()
        changed = bytearray(whole)
        changed[int(reader.offsets[5]) - 512 + at] ^= 0x04
        shard.write_bytes(changed)
        views, valid = reader.views(np.array([4, 5, 6]))
        assert valid.tolist() == [True, False, True] and not len(views[1])
        with pytest.raises(ImageError, match="its shard and the shard's index do not fit each other"):
            reader.read(5, LIMIT)
        shard.write_bytes(whole)
    assert reader.views(np.array([4, 5, 6]))[1].all()


def test_wrong_entry_of_an_index_is_left_to_read(copy: Path) -> None:
    reader = reader_of(copy)
    same = np.flatnonzero(reader.shard_of == reader.shard_of[0])[:2]
    swapped = np.arange(len(reader.sizes))
    swapped[same] = same[::-1]
    for wrong in (
        replace(reader, offsets=reader.offsets[swapped], sizes=reader.sizes[swapped]),
        replace(reader, members=reader.members.take(swapped)),
        replace(reader, offsets=reader.offsets + 1),
        replace(reader, offsets=reader.offsets - 512),
        replace(reader, offsets=np.zeros_like(reader.offsets)),
        replace(reader, offsets=reader.offsets + 10**9),
        replace(reader, sizes=reader.sizes + 1),
    ):
        views, valid = wrong.views(same)
        assert valid.tolist() == [False, False] and [len(view) for view in views] == [0, 0]
        with pytest.raises(ImageError):
            wrong.read(int(same[0]), LIMIT)


@pytest.mark.parametrize("damage", ["truncated", "longer", "removed", "empty"])
def test_shard_that_changed_is_left_to_read(
    copy: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    reader = reader_of(copy)
    number = int(reader.shard_of[0])
    shard = copy / reader.shards[number]
    if damage != "empty":
        assert reader.views(np.flatnonzero(reader.sizes))[1].all()
    size = shard.stat().st_size
    if damage == "removed":
        shard.unlink()
    else:
        os.truncate(shard, {"truncated": 4096, "longer": size + 1, "empty": 0}[damage])
    with caplog.at_level(logging.INFO, "data_pipeline"):
        for _ in range(2):
            views, valid = reader.views(everything(reader))  # in particular, the process lives
            reader.read_ahead(everything(reader))
    outside = (reader.shard_of != number) & (reader.sizes > 0)
    assert valid.tolist() == outside.tolist() and outside.any() and not outside.all()
    assert all(len(view) == size * ok for view, size, ok in zip(views, reader.sizes, valid, strict=True))
    what = {
        "truncated": f"had {size} bytes and has 4096",
        "longer": f"had {size} bytes and has {size + 1}",
        "removed": "cannot be read any more (No such file or directory)",
        "empty": "cannot be mapped into memory (Invalid argument)",
    }[damage]
    assert caplog.messages == [f"shard {shard} {what}: its images are read one by one"]


def test_members_with_long_names_have_views(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    names = ["a.jpg", "b" * 95 + ".jpg", "c" * 96 + ".jpg", "d/" * 70 + "e.jpg", "f" * 200 + ".jpg"]
    with tarfile.open(tmp_path / "train" / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for number, name in enumerate(names):
            for path, content in ((name, b"image %d" % number), (f"{name[:-4]}.cls", b"%d" % (number % 2))):
                info = tarfile.TarInfo(path)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    reader = reader_of(tmp_path)
    views, valid = reader.views(np.array([4, 3, 2, 1, 0]))
    assert [view.tobytes() for view in views] == [b"image %d" % number for number in (4, 3, 2, 1, 0)]
    assert valid.all() and sorted(len(name) for name in reader.members) == [5, 99, 100, 145, 204]
