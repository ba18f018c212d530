"""Shards written to an address and read from it, through fsspec: its memory stands for a bucket."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner

import data_pipeline.remote.cache
import data_pipeline.sharding.upload
from alexnet import main
from data_pipeline.common.errors import SaveError, UserError
from data_pipeline.datasets.open import open_dataset
from data_pipeline.download.fetch import fetch
from data_pipeline.remote import objects
from data_pipeline.remote.objects import open_filesystem, put_object
from data_pipeline.remote.shards import local_root

URL = "s3://bucket/digits"


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(objects._PROTOCOLS, "s3", "memory")
    monkeypatch.setattr("data_pipeline.download.fetch.time.sleep", lambda seconds: None)
    held: dict[Path, int] = {}
    monkeypatch.setattr(data_pipeline.remote.cache, "_held", held)
    files = fsspec.filesystem("memory")
    yield files
    for descriptor in held.values():
        os.close(descriptor)
    files.store.clear()


def test_shards_go_to_an_address_and_come_back(files: Path, shards: Path, tmp_path: Path) -> None:
    def shard(out: str) -> list[str]:
        done = CliRunner().invoke(main, ["data", "shard", str(files), out, "--shard-size", "20KB"])
        return [str(done.exit_code), *done.stdout.splitlines(), *done.stderr.splitlines()[-1:]]

    assert shard(URL)[1].startswith(f"{URL}: 43 samples in ")
    assert not list((tmp_path / "cache" / "alexnet" / "upload").iterdir()), "what was copied is removed here"
    root = local_root(URL)
    for path in shards.rglob("*.*"):
        if path.is_file():
            assert (root / path.relative_to(shards)).read_bytes() == path.read_bytes(), path
    assert open_dataset(root, "train").contents() == open_dataset(shards, "train").contents()
    assert shard(URL)[0] == "2" and "holds shards already, which are never replaced" in shard(URL)[-1]
    assert "nothing is written over HTTP" in shard("https://example.org/x")[-1]


def test_a_copy_that_broke_off_is_gone_on_with(
    files: Path, shards: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[str] = []

    def breaking(path: Path, url: str) -> None:
        if len(put) == 5:
            raise SaveError("the line is cut")
        put.append(url)
        put_object(path, url)

    monkeypatch.setattr(data_pipeline.sharding.upload, "put_object", breaking)
    arguments = ["data", "shard", str(files), URL, "--shard-size", "20KB"]
    broken = CliRunner().invoke(main, arguments)
    assert broken.exit_code == 1 and "the line is cut" in broken.stderr
    assert not memory.exists("bucket/digits/dataset.json"), "nobody reads a half"
    again: list[str] = []

    def noting(path: Path, url: str) -> None:
        again.append(url)
        put_object(path, url)

    monkeypatch.setattr(data_pipeline.sharding.upload, "put_object", noting)
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert again[0] == f"{put[4].removesuffix('.tar')}.tar" and again[-1] == f"{URL}/dataset.json"
    assert not set(put[:4]) & set(again), "whole pairs are not copied again"
    assert len(open_dataset(local_root(URL), "val")) == 12


def test_a_part_is_resumed_and_a_longer_one_is_not(memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    content = os.urandom(30_000)
    memory.pipe_file("bucket/x", content)
    for kept in (content[:10_000], content + b"more"):
        (tmp_path / "x.part").write_bytes(kept)
        fetch("s3://bucket/x", tmp_path / "x", max_bytes=30_000, connection=objects._read_object)
        assert (tmp_path / "x").read_bytes() == content
        (tmp_path / "x").unlink()
    with pytest.raises(UserError, match=r"s3://bucket/y is not there, or may not be read"):
        fetch("s3://bucket/y", tmp_path / "y", connection=objects._read_object)


def test_a_missing_package_is_named() -> None:
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(
        UserError, match=r"gs:// needs fsspec and gcsfs: pip install 'alexnet\[remote\]' gcsfs"
    ):
        open_filesystem("gs://bucket/x")
