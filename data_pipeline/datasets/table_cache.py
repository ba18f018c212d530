"""Keeps the sample table of a large dataset between runs, and uses it only for the samples that it is of.

A kept table is bound to the names, classes and order of the whole split, before the exclude list, so that a
new list needs no new look at the images; tables of shards also to the place of each image and to each
shard's size and time. Files may be rewritten under their names: a few, evenly spread, are compared with their
length in the table and with its time. That finds a folder that was resized in place; a single file that was
is found when it is read. Where files were added or removed, the rows of the others are used again.
"""

from __future__ import annotations

import hashlib
import logging
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.common.image_kind import Kind
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.index_cache import signature_of
from data_pipeline.datasets.kept_files import keep_file, kept_files
from data_pipeline.datasets.sample_table import ROW_BYTES, SampleTable

log = logging.getLogger("data_pipeline")

Int = npt.NDArray[np.int64]

VERSION = 2
"""Raise it when a look at the same files gives another table than before."""

_HEADER = struct.Struct("<QQ32sQ")  # version, time of the look in ns, key, number of rows
_HASHED = 1 << 16
_COMPARED = 256
"""Files of a dataset whose length and time are compared: a millisecond on a local disk."""


def load_table(dataset: Dataset) -> SampleTable | None:
    """Load the kept table of a split; None if there is none, or it is of other samples.

    Args:
        dataset: the whole split, without an exclude list.
    """
    key = b""
    for kept in _kept_tables(dataset):
        key = key or _key(dataset)
        if kept.key != key:
            continue
        if len(kept.table) == len(dataset) and _is_current(dataset, kept.table, kept.looked_ns):
            return kept.table
        log.info("files of %s were changed since the sample table was made: it is not used", dataset.split)
    return None


def load_rows(dataset: Dataset) -> tuple[SampleTable, Int] | None:
    """Load the kept table of a split whose files have changed since, for the files that are still there.

    Args: as `load_table`.
    Returns:
        A table, and for each sample its row in it, or -1 where there is none, or the file could not be read
        then; None where no table is kept, or the samples are in shards.
    """
    if dataset.reader is not None:
        return None
    for kept in _kept_tables(dataset):
        names = name_hashes(PackedStrings.pack(dataset.paths))
        order = np.argsort(kept.names)
        found = np.searchsorted(kept.names[order], names)
        rows = order[np.minimum(found, len(order) - 1)]
        rows[(kept.names[rows] != names) | (kept.table.kinds[rows] == Kind.UNREADABLE)] = -1
        there = np.flatnonzero(rows >= 0)
        if len(there) and _is_current(dataset.take(there), kept.table.take(rows[there]), kept.looked_ns):
            return kept.table, rows
    return None


def save_table(dataset: Dataset, table: SampleTable, looked_ns: int) -> None:
    """Keep the table of a split.

    Args:
        dataset: the whole split, without an exclude list.
        table: a row for each of its samples.
        looked_ns: when the first of its files was looked at, in ns.
    """
    header = _HEADER.pack(VERSION, looked_ns, _key(dataset), len(table))
    names = b"" if dataset.reader is not None else name_hashes(PackedStrings.pack(dataset.paths)).tobytes()
    keep_file(dataset.root, _name(dataset), header + table.pack() + names, "sample table", len(table))


def name_hashes(names: PackedStrings) -> npt.NDArray[np.uint64]:
    """Hash each name to 64 bits, without Python for each. Somebody who wants equal hashes can make them.

    >>> first, second, third = name_hashes(PackedStrings.pack(["a", "a/much/longer/one", "a"]))
    >>> bool(first == third != second)
    True
    """
    hashes = np.full(len(names), 0x9E3779B97F4A7C15, np.uint64)
    for first in range(0, len(names), _HASHED):
        places = np.arange(first, min(first + _HASHED, len(names)))
        rows = names.padded(places)
        words = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8)))
        for column in words.view("<u8").T:
            mixed = (hashes[places] ^ column) * np.uint64(0xBF58476D1CE4E5B9)
            changed = column != 0  # what fills a name up depends on its neighbours
            hashes[places] = np.where(changed, mixed ^ (mixed >> np.uint64(32)), hashes[places])
    return hashes


class _Kept(NamedTuple):
    """A table as it is kept; `names` has the hash of each sample's name, of files."""

    table: SampleTable
    looked_ns: int
    key: bytes
    names: npt.NDArray[np.uint64]


def _kept_tables(dataset: Dataset) -> Iterator[_Kept]:
    """The sound tables that are kept for a split, of these samples or of others."""
    for path, content in kept_files(dataset.root, _name(dataset)):
        try:
            if content is None:
                raise ValueError("its hash is wrong")
            if len(content) < _HEADER.size:
                continue
            version, looked_ns, key, count = _HEADER.unpack_from(content)
            if version != VERSION:
                continue
            end = _HEADER.size + count * ROW_BYTES
            table = SampleTable.unpack(content[_HEADER.size : end])
            names = np.frombuffer(content[end:], "<u8")
            if len(table) != count or len(names) != (count if dataset.reader is None else 0):
                raise ValueError("it is of another length than it says")
        except ValueError as error:
            log.info("the sample table in %s is damaged and not used: %s", printable(path), error)
            continue
        yield _Kept(table, looked_ns, key, names)


def _name(dataset: Dataset) -> str:
    return f"table-{dataset.split}.bin"


def _key(dataset: Dataset) -> bytes:
    """Hash of the samples that a table belongs to: 0.1 s for a million of them."""
    digest = hashlib.sha256(bytes.fromhex(dataset.contents().sha256))
    if (reader := dataset.reader) is not None:
        for column in (reader.shard_of, reader.offsets, reader.sizes):
            digest.update(column.astype("<i8", copy=False).tobytes())
        for shard in reader.shards:
            found = signature_of(dataset.root / shard)  # no device or inode: each node may see others
            digest.update(repr(found and (found.size_bytes, found.modified_ns)).encode())
    return digest.digest()


def _is_current(dataset: Dataset, table: SampleTable, looked_ns: int) -> bool:
    """Whether some files, evenly spread, are older than the table and as long as it says."""
    if looked_ns > time.time_ns():
        return False
    if dataset.reader is not None:  # the key holds what there is to compare
        return True
    places = np.unique(np.linspace(0, len(dataset) - 1, _COMPARED).astype(np.int64))
    for place, length in zip(places.tolist(), table.lengths[places].tolist(), strict=True):
        found = signature_of(f"{dataset.root}/{dataset.folder}/{dataset.paths[place]}")
        size_bytes, modified_ns = (0, 0) if found is None else (found.size_bytes, found.modified_ns)
        # a length of 0 may be that of a file which this user must not read
        if modified_ns >= looked_ns or (length and size_bytes != length):
            return False
    return True
