"""The sample table of a split: made by looking at every image, kept, and the same from files and shards."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.image_kind import Kind
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.image_folder import load_image_folder
from data_pipeline.datasets.open import open_dataset
from data_pipeline.decode.look import Look, look_at
from data_pipeline.loading import scan
from data_pipeline.loading.scan import with_table
from tests.helpers.images import broken, encode, exif, photo, write_folder


def rows(dataset: Dataset) -> list[tuple[Any, ...]]:
    table = dataset.table
    assert table is not None and len(table) == len(dataset)
    columns = (table.lengths, table.sizes, table.kinds, table.orientations, table.direct)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def count_looks(monkeypatch: pytest.MonkeyPatch) -> list[Look]:
    """A list that gets each look that is made."""
    made: list[Look] = []

    def noted(data: bytes) -> Look:
        made.append(look_at(data))
        return made[-1]

    monkeypatch.setattr(scan, "look_at", noted)
    return made


def test_table_has_a_row_for_each_file_in_its_order(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1}, side=40)
    turned = encode(photo(30, 50), "JPEG", exif=exif(6))
    half = broken(30, 50)["jpeg, half"]
    gif = encode(photo(9, 11), "GIF")
    for name, data in {"1.jpg": turned, "2.jpg": half, "3.gif": gif, "4.jpg": b"text", "5.jpg": b""}.items():
        (tmp_path / "train" / "b" / name).write_bytes(data)
    (tmp_path / "train" / "b" / "6.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "train" / "b" / "7.jpg")
    dataset = with_table(load_image_folder(tmp_path, "train"), 1)
    first = (tmp_path / "train" / "a" / "000.jpg").stat().st_size
    second = (tmp_path / "train" / "b" / "000.jpg").stat().st_size
    assert [path.split("/")[1][0] for path in dataset.paths] == ["0", "0", "1", "2", "3", "4", "5", "6", "7"]
    assert rows(dataset) == [
        (first, [40, 40], Kind.JPEG, 1, True),
        (second, [40, 40], Kind.JPEG, 1, True),
        (len(turned), [50, 30], Kind.JPEG, 6, True),
        (len(half), [30, 50], Kind.JPEG, 1, False),
        (len(gif), [9, 11], Kind.GIF, 1, False),
        (4, [1, 1], Kind.UNREADABLE, 1, False),
        (0, [1, 1], Kind.UNREADABLE, 1, False),
        (0, [1, 1], Kind.UNREADABLE, 1, False),
        (0, [1, 1], Kind.UNREADABLE, 1, False),
    ]
    assert with_table(dataset, 1) is dataset
    assert not (tmp_path / ".alexnet").exists()  # too few to be worth a file


@pytest.mark.slow
def test_table_made_by_processes_is_that_of_one(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in sorted((shards / "train").glob("*.tar")):
        (tmp_path / f"train-{path.name}").write_bytes(path.read_bytes())
    dataset = open_dataset(tmp_path, "train")
    reader = dataset.reader
    assert reader is not None and dataset.table is None
    order = np.random.default_rng(0).permutation(len(dataset))  # in the shards' order, the images are read
    alone = rows(with_table(dataset.take(order), 1))
    monkeypatch.setattr(scan, "MANY", 1)
    monkeypatch.setattr(scan, "_LOOK_CHUNK", 6)
    assert rows(with_table(dataset.take(order), 2)) == alone
    assert [row[0] for row in alone] == reader.sizes[order].tolist()


def test_shards_carry_the_table_that_a_scan_of_the_files_makes(files: Path, shards: Path) -> None:
    for split in ("train", "val"):
        carried, scanned = open_dataset(shards, split), with_table(open_dataset(files, split), 1)
        assert rows(carried) == rows(scanned)
        assert with_table(carried, 1) is carried


def test_resized_shards_carry_the_table_of_what_is_in_them(tmp_path: Path) -> None:
    from data_pipeline.sharding.write import write_shards

    write_folder(tmp_path / "in" / "train", {"a": 2, "b": 2}, side=80)
    (tmp_path / "in" / "train" / "b" / "text.jpg").write_bytes(b"no image")
    write_shards(tmp_path / "in", tmp_path / "out", resize_px=32)
    dataset = open_dataset(tmp_path / "out", "train")
    contents = [dataset.read(i) for i in range(len(dataset))]
    looks = [look_at(content) for content in contents]
    assert rows(dataset) == [
        (len(content), [look.height, look.width], look.kind, look.orientation, look.direct)
        for content, look in zip(contents, looks, strict=True)
    ]
    assert [row[1] for row in rows(dataset)] == [[32, 32], [32, 35], [32, 32], [32, 35], [1, 1]]


def test_kept_table_is_used_and_made_anew_when_the_data_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "train", {"a": 3, "b": 2}, side=16)
    looked_at = count_looks(monkeypatch)
    with caplog.at_level(logging.INFO, "data_pipeline"):
        first = with_table(open_dataset(tmp_path, "train", min_cached=1), 1, min_cached=1)
    assert len(looked_at) == 5
    assert f"sample table of 5 images kept in {tmp_path / '.alexnet' / 'table-train.bin'}" in caplog.messages
    assert rows(with_table(load_image_folder(tmp_path, "train"), 1, min_cached=1)) == rows(first)
    assert rows(open_dataset(tmp_path, "train", min_cached=1)) == rows(first)
    assert len(looked_at) == 5
    (tmp_path / "train" / "b" / "new.png").write_bytes(encode(photo(5, 6), "PNG"))
    changed = with_table(open_dataset(tmp_path, "train", min_cached=1), 1, min_cached=1)
    assert len(looked_at) == 6 and rows(changed)[:-1] == rows(first)
    assert rows(changed)[-1][1:] == ([5, 6], Kind.PNG, 1, True)
    assert rows(open_dataset(tmp_path, "train", min_cached=1)) == rows(changed)


def test_another_exclude_list_needs_no_other_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "train", {"a": 3, "b": 3}, side=16)
    excluded = tmp_path / "quarantine.jsonl"
    excluded.write_text('{"path": "train/a/001.jpg", "reason": "x"}\n')
    looked_at = count_looks(monkeypatch)
    opened = open_dataset(tmp_path, "train", min_cached=1)
    dataset = with_table(opened, 1, min_cached=1)
    assert len(looked_at) == 6 and dataset.num_quarantined == 1
    whole = rows(open_dataset(tmp_path, "train", quarantine=False, min_cached=1))
    assert rows(dataset) == [whole[i] for i in (0, 2, 3, 4, 5)]
    assert dataset.contents() == opened.contents()
    excluded.write_text(
        '{"path": "train/b/000.jpg", "reason": "x"}\n{"path": "train/b/002.jpg", "reason": ""}\n'
    )
    assert rows(open_dataset(tmp_path, "train", min_cached=1)) == [whole[i] for i in (0, 1, 2, 4)]
    assert rows(with_table(opened, 1, min_cached=1)) == rows(dataset)  # opened before there was a table
    assert len(looked_at) == 6


def test_data_changed_since_it_was_opened_is_looked_at_alone(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 3, "b": 3}, side=16)
    (tmp_path / "quarantine.jsonl").write_text('{"path": "train/a/001.jpg", "reason": "x"}\n')
    opened = open_dataset(tmp_path, "train", min_cached=1)
    (tmp_path / "train" / "a" / "002.jpg").unlink()
    dataset = with_table(opened, 1, min_cached=1)
    assert [row[0] > 0 for row in rows(dataset)] == [True, False, True, True, True]
    assert not (tmp_path / ".alexnet" / "table-train.bin").exists()
