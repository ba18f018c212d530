"""The kept index follows the data, and is not used where it is damaged or crafted."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.datasets import index_cache
from data_pipeline.datasets.image_folder import load_image_folder
from data_pipeline.datasets.open import open_dataset
from tests.helpers.images import write_folder
from tests.helpers.layouts import SYNSET_IDS, WORDS, make_tiny, touch


def same(root: Path, split: str = "train") -> bool:
    """Whether the opened index is that of a fresh listing."""
    one, other = open_dataset(root, split, min_cached=1), load_image_folder(root, split)
    return list(one.paths) == list(other.paths) and one.labels.tolist() == other.labels.tolist()


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Believe times right after the scan, as if two seconds had passed."""
    monkeypatch.setattr(index_cache, "SETTLE_NS", 0)
    time.sleep(0.02)


CHANGES: dict[str, Callable[[Path], object]] = {
    "added": lambda folder: touch(folder / "a" / "new.jpg"),
    "removed": lambda folder: (folder / "a" / "000.jpg").unlink(),
    "renamed": lambda folder: (folder / "a" / "000.jpg").rename(folder / "a" / "zzz.jpg"),
    "moved": lambda folder: (folder / "a" / "000.jpg").rename(folder / "b" / "moved.jpg"),
    "added below": lambda folder: touch(folder / "b" / "deep" / "new.jpg"),
    "class added": lambda folder: touch(folder / "c" / "1.jpg"),
    "class renamed": lambda folder: (folder / "a").rename(folder / "x"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_index_cache_follows_changes_of_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    write_folder(tmp_path / "train", {"a": 2, "b/deep": 2, "b": 1})
    settle(monkeypatch)
    first = open_dataset(tmp_path, "train", min_cached=1)
    kept = tmp_path / ".alexnet" / "index-train.bin"
    before = kept.stat().st_mtime_ns
    again = open_dataset(tmp_path, "train", min_cached=1)
    assert kept.stat().st_mtime_ns == before and list(again.paths) == list(first.paths)
    times = [(p, p.stat().st_mtime_ns) for p in (tmp_path / "train").rglob("*") if p.is_dir()]
    CHANGES[change](tmp_path / "train")
    for path, modified_ns in times:  # a tool that restores the folders' times does not deceive it
        if path.exists():
            os.utime(path, ns=(modified_ns, modified_ns))
    assert same(tmp_path)
    assert list(open_dataset(tmp_path, "train", min_cached=1).paths) != list(first.paths)


def test_index_cache_follows_the_label_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_tiny(tmp_path)
    settle(monkeypatch)
    first = open_dataset(root, "val", min_cached=1)
    table = root / "val" / "val_annotations.txt"
    table.write_text(
        table.read_text()
        .replace(SYNSET_IDS[0], "n?")
        .replace(SYNSET_IDS[1], SYNSET_IDS[0])
        .replace("n?", SYNSET_IDS[1])
    )
    second = open_dataset(root, "val", min_cached=1)
    assert list(second.paths) == [first.paths[i] for i in (2, 3, 0, 1, 4, 5, 6, 7)]
    (root / "words.txt").write_text(WORDS)
    assert open_dataset(root, "val", min_cached=1).labels_text[2] == "n02012849"
    (root / "words.txt").unlink()
    assert open_dataset(root, "val", min_cached=1).labels_text == ()


def test_index_made_while_the_data_changed_is_not_used(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    open_dataset(tmp_path, "train", min_cached=1)
    assert index_cache.load_index(tmp_path, "train") is None  # its folders are younger than SETTLE_NS


def test_index_cache_that_is_damaged_or_crafted_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "train", {"a": 2, "b": 2})
    settle(monkeypatch)
    good = open_dataset(tmp_path, "train", min_cached=1)
    kept = tmp_path / ".alexnet" / "index-train.bin"
    whole = kept.read_bytes()
    assert index_cache.load_index(tmp_path, "train") is not None
    for damaged in (b"", whole[:-1], whole[:40] + b"?" + whole[41:]):
        kept.write_bytes(damaged)
        assert index_cache.load_index(tmp_path, "train") is None
    from dataclasses import replace

    from data_pipeline.datasets.index_cache import Watch

    watch = Watch(tmp_path)
    watch.note(tmp_path / "train")
    for names in (["../x.jpg"] * 4, ["a/../../x.jpg"] * 4, ["/etc/x.jpg"] * 4, ["a/1.jpg"] * 3):
        index_cache.save_index(replace(good, paths=PackedStrings.pack(names)), watch)
        assert index_cache.load_index(tmp_path, "train") is None
    index_cache.save_index(replace(good, labels=good.labels + 1), watch)
    assert index_cache.load_index(tmp_path, "train") is None
    with caplog.at_level(logging.INFO, "data_pipeline"):
        assert same(tmp_path)
    assert caplog.messages == [
        f"the index of {tmp_path} is not one of ours: listing the files again",
        f"index of 4 images kept in {kept}",
    ]


def test_index_goes_to_the_users_cache_beside_read_only_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    write_folder(root / "train", {"a": 1, "b": 1})
    (root / ".alexnet").write_text("a file where the folder would be")  # as root, modes forbid nothing
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settle(monkeypatch)
    open_dataset(root, "train", min_cached=1)
    (kept,) = (tmp_path / "cache").rglob("index-train.bin")
    assert index_cache.load_index(root, "train") is not None
    assert [path.name for path in kept.parent.iterdir()] == ["index-train.bin"]
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").write_text("neither here")
    assert same(root)


def test_index_cache_is_not_written_for_small_data(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    open_dataset(tmp_path, "train")
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
