"""Keeps the sample table of a large dataset between runs, and uses it only for the samples that it is of.

A kept table is bound to the names, classes and order of the whole split, before the exclude list, so that a
new list needs no new look at the images; tables of shards also to the place of each image and to each
shard's size and time. Files may be rewritten under their names: a few, evenly spread, are compared with their
length in the table and with its time. That finds a folder that was resized in place; a single file that was
is found when it is read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import time

import numpy as np

from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.kept_files import keep_file, kept_files
from data_pipeline.datasets.sample_table import ROW_BYTES, SampleTable
from data_pipeline.datasets.watch import signature_of

log = logging.getLogger("data_pipeline")

VERSION = 1
"""Raise it when a look at the same files gives another table than before."""

_HEADER = struct.Struct("<QQ32s")  # version, time of the look in ns, key
_COMPARED = 256
"""Files of a dataset whose length and time are compared: a millisecond on a local disk."""


def load_table(dataset: Dataset) -> SampleTable | None:
    """Load the kept table of a split; None if there is none, or it is of other samples.

    Args:
        dataset: the whole split, without an exclude list.
    """
    key = b""
    for path, content in kept_files(dataset.root, _name(dataset)):
        try:
            if content is None:
                raise ValueError("its hash is wrong")
            if len(content) != _HEADER.size + len(dataset) * ROW_BYTES:
                continue
            version, looked_ns, of_key = _HEADER.unpack_from(content)
            key = key or _key(dataset)
            if version != VERSION or of_key != key:
                continue
            table = SampleTable.unpack(content[_HEADER.size :])
        except ValueError as error:
            log.info("the sample table in %s is damaged and not used: %s", printable(path), error)
            continue
        if _is_current(dataset, table, looked_ns):
            return table
        log.info("files of %s were changed since the sample table was made: it is not used", dataset.split)
    return None


def save_table(dataset: Dataset, table: SampleTable, looked_ns: int) -> None:
    """Keep the table of a split.

    Args:
        dataset: the whole split, without an exclude list.
        table: a row for each of its samples.
        looked_ns: when the first of its files was looked at, in ns.
    """
    header = _HEADER.pack(VERSION, looked_ns, _key(dataset))
    keep_file(dataset.root, _name(dataset), header + table.pack(), "sample table", len(table))


def _name(dataset: Dataset) -> str:
    return f"table-{dataset.split}.bin"


def _key(dataset: Dataset) -> bytes:
    """What a table is bound to, hashed: 0.1 s for a million samples."""
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
        try:
            status = os.stat(f"{dataset.root}/{dataset.split}/{dataset.paths[place]}")  # noqa: PTH116
        except (OSError, ValueError):
            if length:
                return False
            continue
        # a length of 0 may be that of a file which this user must not read
        if status.st_mtime_ns >= looked_ns or (length and status.st_size != length):
            return False
    return True
