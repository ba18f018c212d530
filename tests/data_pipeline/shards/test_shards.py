"""Tar shards: the same stream as files, and nothing of an index is trusted."""

from __future__ import annotations

import json
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.common.errors import CorruptFileError, ImageError, UserError
from data_pipeline.datasets.open import open_dataset, splits_of
from data_pipeline.decode.backend import make_backend
from data_pipeline.loader import Loader
from data_pipeline.shards import mapped_shards
from data_pipeline.shards.shard_format import encode_index
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.preprocessing import Preprocessing
from tests.helpers.command_line import assert_one_line, invoke

PREPROCESSING = Preprocessing(resize_px=36, crop_px=32)


def test_shards_hold_the_same_samples_as_files(files: Path, shards: Path) -> None:
    assert splits_of(shards) == ("train", "val")
    for split in ("train", "val"):
        want, got = open_dataset(files, split), open_dataset(shards, split)
        assert list(got.paths) == list(want.paths)
        assert got.labels.tolist() == want.labels.tolist()
        assert (got.classes, got.labels_text) == (want.classes, want.labels_text)
        for i in range(len(want)):
            if want.paths[i].endswith("empty.jpg"):
                with pytest.raises(ImageError, match=r"^empty file$"):
                    got.read(i)
            else:
                assert got.read(i) == want.read(i)
    member = got.path_at(5)
    assert member.name == "00000005.jpg" and member.parent.suffix == ".tar" and member.parent.is_file()
    with tarfile.open(member.parent) as tar:
        extracted = tar.extractfile(member.name)
        assert extracted is not None and extracted.read() == got.read(5)


@pytest.mark.parametrize("name", ["dali", "pillow"])
def test_shards_give_the_same_stream_bit_for_bit(files: Path, shards: Path, name: Any) -> None:
    backend = make_backend(name, device="cpu", preprocessing=PREPROCESSING, max_batch=10, num_threads=2)
    loader = Loader(backend, PREPROCESSING)

    def stream(root: Path) -> Iterator[tuple[Any, ...]]:
        train, val = open_dataset(root, "train"), open_dataset(root, "val")
        options: dict[str, Any] = {"seed": 5, "global_batch": 10, "num_steps": 7}
        for batches in (
            loader.train(train, Augment(), balance=1.0, **options),
            loader.eval(val, micro_batch=5),
        ):
            for batch in batches:
                yield (
                    batch.images.tobytes(), batch.labels.tolist(), batch.indices.tolist(), batch.step,
                    [failure.reason for failure in batch.failures],
                )  # fmt: skip

    from_files, from_shards = list(stream(files)), list(stream(shards))
    backend.close()
    assert from_shards == from_files and len(from_files) == 10
    assert [reason for batch in from_files for reason in batch[4]] == ["empty file"] * 2


def test_foreign_shards_are_listed_by_their_headers(shards: Path, tmp_path: Path) -> None:
    for path in sorted((shards / "train").glob("*.tar")):
        (tmp_path / f"mine-train-{path.name}").write_bytes(path.read_bytes())
    dataset = open_dataset(tmp_path, "train")
    ours = open_dataset(shards, "train")
    assert dataset.classes == ("0", "1", "2") and len(dataset) == len(ours)
    numbers = [int(Path(path).stem) for path in dataset.paths]
    assert dataset.labels.tolist() == ours.labels[np.array(numbers)].tolist()
    assert dataset.read(2) == ours.read(numbers[2])
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert open_dataset(tmp_path, "train").classes == ("a", "b", "c")
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\nc\r\n\r\n")
    assert open_dataset(tmp_path, "train").classes == ("a", "b", "c")
    (tmp_path / "classes.txt").write_text("a\n\nb\nc\n")
    with pytest.raises(UserError, match=r"classes.txt line 2 is empty: name a class in each line"):
        open_dataset(tmp_path, "train")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"a class 2 and classes.txt names 2 classes"):
        open_dataset(tmp_path, "train")
    shard = next(tmp_path.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(CorruptFileError, match=r"shard .* is no whole tar file"):
        open_dataset(tmp_path, "train")


Edit = Callable[[dict[str, Any]], object]
CRAFTED: dict[str, tuple[Edit, str]] = {
    "behind the end": (
        lambda index: index["offsets"].__setitem__(0, 10**9),
        "an entry lies outside the shard",
    ),
    "over the end": (lambda index: index["sizes"].__setitem__(0, 2**62), "an entry lies outside the shard"),
    "before the start": (lambda index: index["offsets"].__setitem__(0, -512), "lies outside the shard"),
    "beyond 64 bits": (lambda index: index["offsets"].__setitem__(0, 2**70), "is damaged"),
    "unknown class": (lambda index: index["labels"].__setitem__(0, 3), "outside the shard or the classes"),
    "a list too short": (lambda index: index["names"].pop(), "lies outside the shard"),
    "a sample twice": (
        lambda index: index["numbers"].__setitem__(0, index["numbers"][1]),
        "each sample once",
    ),
    "a text for a number": (lambda index: index["sizes"].__setitem__(0, "9"), "is damaged: Expected `int`"),
    "a size of nothing": (
        lambda index: index["widths"].__setitem__(0, 0),
        "is damaged: a size is not within 1",
    ),
    "a size beyond 32 bits": (
        lambda index: index["heights"].__setitem__(0, 2**31),
        "is damaged: a size is not",
    ),
    "a size beyond 64 bits": (
        lambda index: index["heights"].__setitem__(0, 2**70),
        "is damaged: .* too large",
    ),
    "an orientation of 9": (lambda index: index["orientations"].__setitem__(0, 9), "an orientation is not"),
    "an unknown kind": (lambda index: index["kinds"].__setitem__(0, 99), "is damaged: a kind is not within"),
    "neither direct nor not": (lambda index: index["direct"].__setitem__(0, 2), "what DALI may read is not"),
    "too few looks": (lambda index: index["direct"].pop(), "is damaged: .* inhomogeneous"),
    "of another set": (lambda index: index.__setitem__("plan", "x"), "is of another set of shards"),
}


@pytest.mark.parametrize("kind", list(CRAFTED))
def test_crafted_shard_index_is_refused(copy: Path, kind: str) -> None:
    edit, reason = CRAFTED[kind]
    path = copy / "train" / "shard-000000.json"
    index = json.loads(path.read_bytes())
    edit(index)
    del index["seal"]
    path.write_bytes(encode_index(index))
    with pytest.raises(CorruptFileError, match=reason):
        open_dataset(copy, "train")


@pytest.mark.parametrize("name", ["train/shard-000000.json", "dataset.json"])
def test_changed_digit_of_an_index_or_the_manifest_is_refused(copy: Path, name: str) -> None:
    text = (copy / name).read_text()
    key = '"labels":[' if name != "dataset.json" else '"classes":["'
    assert text.count(key) == 1
    place = text.index(key) + len(key)
    other = "1" if text[place] == "0" else "0"
    (copy / name).write_text(text[:place] + other + text[place + 1 :])
    with pytest.raises(CorruptFileError, match=r"json is not what was written, by its own hash: write the"):
        open_dataset(copy, "train")
    assert_one_line(invoke("data", "verify", copy), 1, f"{Path(name).name} is not what was written")


def test_damaged_shards_are_named(copy: Path) -> None:
    first, second = sorted((copy / "train").glob("*.tar"))[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    with pytest.raises(CorruptFileError, match=r"shard-000000.tar has \d+ bytes and its index says \d+"):
        open_dataset(copy, "train")
    first.write_bytes(whole)
    second.with_suffix(".json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"shard-000001.json is damaged: .*; write the shards again"):
        open_dataset(copy, "train")
    second.with_suffix(".json").unlink()
    with pytest.raises(CorruptFileError, match=r"cannot read .*shard-000001.json: No such file"):
        open_dataset(copy, "train")
    second.unlink()
    with pytest.raises(CorruptFileError, match=r"and the shards of train differ, first in shard-000001.tar"):
        open_dataset(copy, "train")
    (copy / "dataset.json").write_text("[" * 100_000)
    with pytest.raises(CorruptFileError, match=r"dataset.json is damaged"):
        open_dataset(copy, "train")


def test_shard_sample_is_read_only_at_its_header(copy: Path) -> None:
    path = copy / "val" / "shard-000000.json"
    index = json.loads(path.read_bytes())
    for name in ("offsets", "sizes"):  # two samples exchanged: each would be read under the other's label
        index[name][0], index[name][1] = index[name][1], index[name][0]
    del index["seal"]
    path.write_bytes(encode_index(index))
    dataset = open_dataset(copy, "val")
    for number in index["numbers"][:2]:
        with pytest.raises(ImageError, match="its shard and the shard's index do not fit each other"):
            dataset.read(number)
    assert dataset.read(index["numbers"][2])
    with pytest.raises(ImageError, match="is above the limit of 10"):
        dataset.read(index["numbers"][2], max_bytes=10)
    shard = path.with_suffix(".tar")
    os.truncate(shard, 600)
    with pytest.raises(ImageError, match="has become shorter than its index says"):
        dataset.read(index["numbers"][2])


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_shard_reader_shares_few_open_files_among_threads(
    shards: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped_shards, "MAX_OPEN", 2)
    dataset, want = open_dataset(shards, "train"), open_dataset(files, "train")
    before = num_open_files()
    chosen = [
        i for i in np.random.default_rng(0).integers(0, len(want), 2000).tolist() if want.labels[i] != 1
    ]
    expected = {i: want.read(i) for i in set(chosen)}
    gate = threading.Barrier(8)

    def work(part: int) -> bool:
        gate.wait()
        return all(dataset.read(i) == expected[i] for i in chosen[part::8])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert num_open_files() - before <= 8 + 2
    dataset = want
    assert num_open_files() == before


def test_take_keeps_the_bytes_and_names_of_samples(shards: Path) -> None:
    whole = open_dataset(shards, "train")
    part = whole.take(np.array([20, 3, 7]))
    assert [part.read(i) for i in range(3)] == [whole.read(i) for i in (20, 3, 7)]
    assert part.name_at(0) == whole.name_at(20) and part.labels.tolist() == whole.labels[[20, 3, 7]].tolist()
