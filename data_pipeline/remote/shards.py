"""Shards that are elsewhere become a local folder: whole, verified, once for all processes of a machine."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_pipeline.common.console import Progress, show_progress
from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import check_writable, place_in_cache, write_atomic
from data_pipeline.common.text import printable
from data_pipeline.datasets.splits import SPLITS
from data_pipeline.download.fetch import size_of
from data_pipeline.remote.address import name_of, remote_url
from data_pipeline.remote.cache import DEFAULT_GB, alone, hold, reserve
from data_pipeline.remote.objects import fetch_object
from data_pipeline.shards.shard_format import (
    MANIFEST,
    ShardEntry,
    ShardManifest,
    index_path,
    load_index,
    read_manifest,
)

log = logging.getLogger("data_pipeline")

AT_ONCE = 4
"""Shards that are fetched at the same time."""
MAX_MANIFEST_BYTES = 64 << 20
MAX_INDEX_BYTES = 1 << 30
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\.tar")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class _Source:
    """A set of shards elsewhere, and its folder in the cache."""

    url: str
    manifest: ShardManifest
    folder: Path

    def path_of(self, split: str, entry: ShardEntry) -> Path:
        return self.folder / split / entry.name

    def is_there(self, split: str, entry: ShardEntry) -> bool:
        """Whether a shard is there: both files have their names only once they are whole and verified."""
        path = self.path_of(split, entry)
        return size_of(path) == entry.size_bytes and index_path(path).is_file()


def local_root(
    root: str | os.PathLike[str], splits: Sequence[str] = (), *, cache_gb: float = DEFAULT_GB
) -> Path:
    """The folder of some data on this machine: itself, or for an address that of its shards in the cache.

    One process of a machine fetches, and others wait for it. The shards stay while a process that asked for
    them runs; then they may make room for others.

    Args:
        root: a folder, or an address.
        splits: those that are needed; none for all.
        cache_gb: most gigabytes of all shards in the cache.
    Raises:
        UserError: no such shards, a server that does not answer, or a cache that is too small.
        CorruptFileError: what is there does not fit its hashes, also when it was fetched a second time.
        SaveError: a full disk.
    """
    if (url := remote_url(root)) is None:
        return Path(root)
    cache = place_in_cache("shards", "shards")
    check_writable(cache, "set XDG_CACHE_HOME to a folder for shards")
    cache.mkdir(parents=True, exist_ok=True)
    manifest, text = _fetch_manifest(url, cache)
    id = hashlib.sha256(url.encode() + b"\0" + text).hexdigest()[:16]
    source = _Source(url, manifest, cache / id / name_of(url))
    every = [(split, entry) for split, entries in manifest.splits.items() for entry in entries]
    hold(cache, id)
    with alone(cache, f"{id}.fetch", f"another process fetches {url}: waiting for it"):
        absent = [(split, entry) for split, entry in every if not source.is_there(split, entry)]
        missing = [(split, entry) for split, entry in absent if not splits or split in splits]
        total, off, lacking = (
            sum(entry.size_bytes for _, entry in part) for part in (every, absent, missing)
        )
        reserve(cache, id, total - off + lacking, lacking, int(cache_gb * 1e9), url)
        source.folder.mkdir(exist_ok=True)
        if missing:
            _fetch_all(source, missing)
        if not (source.folder / MANIFEST).is_file():
            write_atomic(source.folder / MANIFEST, text)
    log.info("%s: read from %s", url, printable(source.folder))
    return source.folder


def _fetch_manifest(url: str, cache: Path) -> tuple[ShardManifest, bytes]:
    """Fetch `dataset.json`, and refuse one whose names or figures are none that we write."""
    address = f"{url}/{MANIFEST}"
    with tempfile.TemporaryDirectory(prefix=".manifest-", dir=cache) as folder:
        path = Path(folder) / MANIFEST
        fetch_object(address, path, Progress(), max_bytes=MAX_MANIFEST_BYTES)
        try:
            manifest = read_manifest(Path(folder))
        except (CorruptFileError, UserError) as error:
            raise type(error)(str(error).replace(printable(path), address)) from error
        text = path.read_bytes()
    assert manifest is not None
    for split, entries in manifest.splits.items():
        if split not in SPLITS:
            raise CorruptFileError(f"{address} names a split {split[:100]!r}: there are {', '.join(SPLITS)}")
        for entry in entries:
            if not _NAME.fullmatch(entry.name):
                raise CorruptFileError(f"{address} names a shard {entry.name[:100]!r}, which is none of ours")
            if entry.size_bytes <= 0 or not _SHA256.fullmatch(entry.sha256):
                raise CorruptFileError(f"{address}: {entry.name} has no size or no SHA-256")
        if len({entry.name for entry in entries}) < len(entries):
            raise CorruptFileError(f"{address} names a shard of {split} twice")
    return manifest, text


class _Shared(Progress):
    """Progress of several threads; it stops them all once one has failed, or Ctrl-C came."""

    def __init__(self, shown: Progress) -> None:
        self._shown, self._lock, self.stopped = shown, threading.Lock(), False

    def advance(self, count: int, note: str = "") -> None:
        if self.stopped:
            raise UserError("stopped")  # of a thread whose error nobody sees: another one ended the work
        with self._lock:
            self._shown.advance(count, note)


def _fetch_all(source: _Source, missing: list[tuple[str, ShardEntry]]) -> None:
    # what an earlier process left of a shard is not fetched again
    paths = [source.path_of(split, entry) for split, entry in missing]
    there = sum(size_of(path) + size_of(path.with_name(f"{path.name}.part")) for path in paths)
    lacking = max(0, sum(entry.size_bytes for _, entry in missing) - there)
    log.info("fetching %d shards, %.3g GB, from %s", len(missing), lacking / 1e9, source.url)
    with show_progress(f"fetch {source.folder.name}, MB", -(-lacking // 1_000_000)) as shown:
        progress = _Shared(shown)
        with ThreadPoolExecutor(AT_ONCE, "fetch") as pool:
            try:
                list(pool.map(partial(_fetch_shard, source, progress), *zip(*missing, strict=True)))
            except BaseException:
                progress.stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _fetch_shard(source: _Source, progress: Progress, split: str, entry: ShardEntry) -> None:
    """Fetch the index and then the shard; what does not fit its hash is fetched once more."""
    try:
        _fetch_pair(source, progress, split, entry)
    except CorruptFileError as error:
        log.warning("%s; it is fetched once more", error)
        _fetch_pair(source, progress, split, entry)


def _fetch_pair(source: _Source, progress: Progress, split: str, entry: ShardEntry) -> None:
    path = source.path_of(split, entry)
    address = f"{source.url}/{split}/{entry.name}"
    index_address, arrived = f"{address.removesuffix('.tar')}.json", path.with_suffix(".index")
    arrived.unlink(missing_ok=True)
    fetch_object(index_address, arrived, Progress(), max_bytes=MAX_INDEX_BYTES)
    try:
        index = load_index(arrived)
    except CorruptFileError as error:
        arrived.unlink()
        raise CorruptFileError(str(error).replace(printable(arrived), index_address)) from error
    found = (index.plan, index.size_bytes, index.sha256, len(index.numbers))
    if found != (source.manifest.plan, entry.size_bytes, entry.sha256, entry.num_samples):
        arrived.unlink()
        raise CorruptFileError(f"{index_address} is not the index of the shard that {MANIFEST} names")
    if size_of(path) != entry.size_bytes:
        fetch_object(address, path, progress, size_bytes=entry.size_bytes, sha256=entry.sha256, max_bytes=0)
    arrived.replace(index_path(path))
