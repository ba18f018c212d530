"""Datasets that several tests read: as files, and as tar shards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.sharding.write import write_shards
from tests.helpers.images import encode, photo, write_folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of three classes in two splits; one is a PNG, one empty, one named in Latin-1."""
    root = tmp_path_factory.mktemp("files")
    write_folder(root / "train", {"a": 12, "b": 9, "c": 7}, suffix=".JPEG")
    write_folder(root / "val", {"a": 4, "b": 4, "c": 4})
    (root / "train" / "b" / "x.png").write_bytes(encode(photo(50, 60), "PNG"))
    (root / "train" / "b" / "empty.jpg").touch()
    (root / "train" / "a" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(encode(photo(50, 60, 3), "JPEG"))
    (root / "words.txt").write_text("a\tapple\nb\tbanana\nc\tcherry\n")
    return root


@pytest.fixture(scope="module")
def shards(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    report = write_shards(files, out, shard_bytes=20_000, workers=2)
    assert (report.num_samples, report.num_reused, report.num_unchanged) == (43, 0, 0)
    assert report.num_shards == len(list(out.glob("*/*.tar"))) > 4
    return out


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """Shards that a test may damage."""
    for path in shards.rglob("*"):
        if path.is_file():
            target = tmp_path / "copy" / path.relative_to(shards)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "copy"
