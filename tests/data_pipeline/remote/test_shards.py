"""Shards behind a real server, which breaks off and lies, become the folder that they were written as."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import data_pipeline.remote.cache
from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.datasets.open import open_dataset, splits_of
from data_pipeline.remote.shards import local_root
from data_pipeline.shards.shard_format import ShardEntry, ShardManifest, encode_index, read_manifest
from tests.helpers.http_server import Server, serving


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own for each test, no waits between connections, and locks that end with the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("data_pipeline.download.fetch.time.sleep", lambda seconds: None)
    held: dict[Path, int] = {}
    monkeypatch.setattr(data_pipeline.remote.cache, "_held", held)
    yield tmp_path / "cache" / "alexnet" / "shards"
    release(held)


def release(held: dict[Path, int]) -> None:
    """Let go of all sets of shards, as the end of a process does."""
    while held:
        os.close(held.popitem()[1])


@pytest.fixture
def server(shards: Path) -> Iterator[Server]:
    with serving() as made:
        made.files = {
            f"/{prefix}/{path.relative_to(shards)}": path.read_bytes()
            for prefix in ("digits", "other")
            for path in shards.rglob("*")
            if path.is_file()
        }
        yield made


def url_of(server: Server, name: str = "digits") -> str:
    return f"http://127.0.0.1:{server.server_port}/{name}"


def tars(server: Server) -> list[str]:
    return [path for path in server.paths if path.endswith(".tar")]


def test_shards_elsewhere_are_the_same_data(server: Server, shards: Path, cache: Path) -> None:
    root = local_root(Path(url_of(server)))  # a path, in which one of the slashes is lost
    assert root.is_relative_to(cache) and root.name == "digits"
    assert splits_of(root) == ("train", "val")
    for split in ("train", "val"):
        here, there = open_dataset(root, split), open_dataset(shards, split)
        assert here.contents() == there.contents() and np.array_equal(here.labels, there.labels)
        assert [here.read(i) for i in range(3)] == [there.read(i) for i in range(3)]
        assert here.table is not None and here.reader is not None
    assert sorted(p.relative_to(root) for p in root.rglob("*.*") if not p.is_dir()) == sorted(
        p.relative_to(shards) for p in shards.rglob("*.*") if not p.is_dir()
    )
    server.paths.clear()
    assert local_root(url_of(server)) == root
    assert server.paths == ["/digits/dataset.json"], "nothing is fetched twice"
    assert local_root(shards) == shards, "a folder is itself"


def test_only_the_split_that_is_needed_is_fetched(server: Server, shards: Path) -> None:
    root = local_root(url_of(server), ["val"])
    assert len(open_dataset(root, "val")) == 12 and not (root / "train").exists()
    assert {path.split("/")[2] for path in tars(server)} == {"val"}
    assert len(open_dataset(local_root(url_of(server), ["train"]), "train")) == 31


def test_each_connection_breaks_off_and_is_resumed(server: Server, shards: Path) -> None:
    server.mode, server.bad = "breaks off", ".tar"
    root = local_root(url_of(server))
    assert [open_dataset(root, split).contents() for split in ("train", "val")] == [
        open_dataset(shards, split).contents() for split in ("train", "val")
    ]
    size = len((server.files or {})["/digits/val/shard-000000.tar"])
    asked = [
        r for p, r in zip(server.paths, server.asked, strict=True) if p == "/digits/val/shard-000000.tar"
    ]
    assert asked == [None, f"bytes={size // 2}-"]
    for tar in root.rglob("*.tar"):
        assert tar.read_bytes() == (shards / tar.relative_to(root)).read_bytes()


def test_two_at_a_time_fetch_once(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Locks are of open files, so that threads stand for processes."""
    found: list[Path] = []
    with caplog.at_level(logging.INFO):
        threads = [
            threading.Thread(target=lambda: found.append(local_root(url_of(server)))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 3 and len(set(found)) == 1
    assert len(tars(server)) == len(set(tars(server))) > 4
    assert [
        record.message.partition(",")[0] for record in caplog.records if "fetching" in record.message
    ] == [f"fetching {len(tars(server))} shards"]


@pytest.mark.parametrize("bad", ["val/shard-000000.tar", "val/shard-000000.json"])
def test_a_damaged_file_is_fetched_once_more(
    server: Server, shards: Path, bad: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.mode, server.bad = "damaged at first", bad
    with caplog.at_level(logging.WARNING):
        root = local_root(url_of(server))
    (record,) = caplog.records
    assert record.message.endswith("; it is fetched once more") and bad in record.message
    assert (root / bad).read_bytes() == (shards / bad).read_bytes()


@pytest.mark.parametrize(
    ("mode", "bad", "words"),
    [
        ("damaged", "val/shard-000000.tar", "is not the file that was published: it has the sha256"),
        ("damaged", "val/shard-000000.json", "is not what was written, by its own hash|is damaged"),
        ("goes on for ever", "val/shard-000000.tar", "has more than"),
        ("claims more", "val/shard-000000.json", "is damaged|could not be fetched"),
        ("shorter", "val/shard-000000.tar", "could not be fetched: the connection ended early"),
        ("redirects to a file", "dataset.json", "'file:///etc/passwd' is not allowed; look whether"),
        ("redirects to a file", "val/shard-000000.tar", "'file:///etc/passwd' is not allowed"),
        ("not found", "val/shard-000000.tar", "the server answered 404"),
        ("damaged", "dataset.json", r"/digits/dataset\.json is (damaged|not what was written)"),
        ("not found", "dataset.json", "the server answered 404 Not Found; look whether it is the address"),
    ],
)
def test_what_stays_wrong_is_one_line(server: Server, cache: Path, mode: str, bad: str, words: str) -> None:
    server.mode, server.bad = mode, bad
    with pytest.raises((UserError, CorruptFileError), match=words) as caught:
        local_root(url_of(server))
    assert "\n" not in str(caught.value) and "/.manifest-" not in str(caught.value)
    assert not list(cache.glob("*/digits/val/shard-000000.json"))
    assert not list(cache.glob("*/digits/dataset.json")), "what is not whole is not opened"


def entry(**changes: Any) -> Callable[[ShardEntry], ShardEntry]:
    return lambda entry: msgspec.structs.replace(entry, **changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (entry(name="/etc/cron.d/x.tar"), "names a shard '/etc/cron.d/x.tar', which is none of ours"),
        (entry(name="../../x.tar"), "which is none of ours"),
        (entry(name="..tar"), "which is none of ours"),
        (entry(name=".shard-000000.tar"), "which is none of ours"),
        (entry(name="a\nb.tar"), "which is none of ours"),
        (entry(name="shard-000000.exe"), "which is none of ours"),
        (entry(size_bytes=-1), "has no size or no SHA-256"),
        (entry(sha256=""), "has no size or no SHA-256"),
        (entry(sha256="0" * 64), "is not the index of the shard that dataset.json names"),
        (entry(size_bytes=5), "is not the index of the shard that dataset.json names"),
    ],
)
def test_a_manifest_cannot_lead_elsewhere(
    server: Server, shards: Path, tmp_path: Path, change: Callable[[ShardEntry], ShardEntry], words: str
) -> None:
    manifest = read_manifest(shards)
    assert manifest is not None and server.files is not None
    first, *others = manifest.splits["val"]
    splits = manifest.splits | {"val": [change(first), *others]}
    changed = msgspec.structs.replace(manifest, splits=splits)
    server.files["/digits/dataset.json"] = encode_index(changed)
    with pytest.raises(CorruptFileError, match=words):
        local_root(url_of(server), ["val"])
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_a_split_cannot_lead_elsewhere(server: Server, shards: Path) -> None:
    manifest = read_manifest(shards)
    assert isinstance(manifest, ShardManifest) and server.files is not None
    changed = msgspec.structs.replace(manifest, splits={"../..": manifest.splits["val"]})
    server.files["/digits/dataset.json"] = encode_index(changed)
    with pytest.raises(CorruptFileError, match=r"names a split '\.\./\.\.'"):
        local_root(url_of(server))


def test_too_small_a_cache_is_one_line_before_it_is_filled(server: Server, shards: Path) -> None:
    size = sum(path.stat().st_size for path in shards.rglob("*.tar"))
    with pytest.raises(
        UserError, match=r"takes .* GB, and the cache of shards holds .* \(data.remote_cache_gb\)"
    ):
        local_root(url_of(server), cache_gb=(size - 1) / 1e9)
    assert tars(server) == []
    local_root(url_of(server), cache_gb=(size + 1) / 1e9)


def test_the_longest_unused_makes_room_and_nothing_in_use(server: Server, shards: Path, cache: Path) -> None:
    size = sum(path.stat().st_size for path in shards.rglob("*.tar"))
    limit = 1.5 * size / 1e9
    first = local_root(url_of(server), cache_gb=limit)
    with pytest.raises(UserError, match="running processes use"):
        local_root(url_of(server, "other"), cache_gb=limit)
    assert len(open_dataset(first, "train")) == 31
    release(data_pipeline.remote.cache._held)
    second = local_root(url_of(server, "other"), cache_gb=limit)
    assert len(open_dataset(second, "train")) == 31 and not first.exists()
    assert len(list(cache.glob("*/size_bytes"))) == 1
    release(data_pipeline.remote.cache._held)
    assert local_root(url_of(server), cache_gb=3 * limit) == first and second.exists()


def test_another_version_at_an_address_is_another_folder(server: Server, shards: Path) -> None:
    first = local_root(url_of(server), ["val"])
    manifest = read_manifest(shards)
    assert manifest is not None and server.files is not None
    renamed = msgspec.structs.replace(manifest, labels_text=["x", "y", "z"])
    server.files["/digits/dataset.json"] = encode_index(renamed)
    second = local_root(url_of(server), ["val"])
    assert second != first and open_dataset(second, "val").labels_text == ("x", "y", "z")
