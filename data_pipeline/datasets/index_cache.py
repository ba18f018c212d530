"""Keeps the index of a large dataset between runs, and uses it only while the data is unchanged.

A scan's `Watch` has recorded every folder it listed and every label file it read or missed, each with its
modification and change times. A file added, removed or renamed changes its folder's times; a label file that
is edited, its own. Times within `SETTLE_NS` of the scan are not trusted, since a later change could bear
the same time. The content of images is not part of the index.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import msgspec
import numpy as np

from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.common.passed_over import PassedOver
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.kept_files import keep_file, kept_files

log = logging.getLogger("data_pipeline")

VERSION = 2
"""Raise it when a scan of the same tree gives another index than before."""

SETTLE_NS = 2_000_000_000


class Signature(msgspec.Struct, array_like=True, frozen=True):
    """The file status that changes when the entries of a folder or the content of a file do."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int


def signature_of(path: str | os.PathLike[str]) -> Signature | None:
    """The signature of a file or folder; None where it does not exist."""
    try:
        status = os.stat(path)  # noqa: PTH116 - half the cost of Path.stat, for thousands of folders
    except (OSError, ValueError):
        return None
    return Signature(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Watch:
    """The folders and files that a scan depends on, recorded before they are read.

    Args:
        root: the data folder; everything noted must lie in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.started_ns = time.time_ns()
        self.seen: dict[str, Signature | None] = {}

    def note(self, path: str | os.PathLike[str]) -> None:
        """Record a file or folder as it is now, or that it is missing."""
        name = os.path.relpath(path, self.root)
        self.seen.setdefault(name, signature_of(path))


class _Stored(msgspec.Struct, array_like=True):
    """An index as it is stored. Names are bytes in the file system's encoding; arrays are little-endian."""

    version: int
    split: bytes
    folder: bytes
    passed_over: PassedOver
    scanned_ns: int
    watched: list[tuple[bytes, Signature | None]]
    classes: list[bytes]
    labels_text: list[str]
    blob: bytes
    ends: bytes
    labels: bytes


def load_index(root: Path, split: str, folder: str | None = None) -> Dataset | None:
    """Load the stored index of a split; None if there is none, or the data has changed since.

    Args:
        root: the data folder.
        split: the split.
        folder: name of its folder; None if it is named as the split.
    """
    for path, content in kept_files(root, _name(split)):
        stored = None if content is None else _decode(content, split)
        if stored is None:
            log.info("the index in %s is damaged or of another version: listing the files again", path)
        elif stored.folder == os.fsencode(folder or split) and _is_current(stored, root):
            return _dataset(stored, root, split)
    return None


def save_index(dataset: Dataset, watch: Watch) -> None:
    """Store the index: in `.alexnet/` of the data folder or, if it cannot be written, in the user's cache.

    Args:
        dataset: a split of files; its `reader` is None.
        watch: the files and folders that the scan of it looked at.
    """
    names = PackedStrings.pack(dataset.paths)
    stored = _Stored(
        version=VERSION,
        split=os.fsencode(dataset.split),
        folder=os.fsencode(dataset.folder),
        passed_over=dataset.passed_over,
        scanned_ns=watch.started_ns,
        watched=[(os.fsencode(name), signature) for name, signature in watch.seen.items()],
        classes=[os.fsencode(name) for name in dataset.classes],
        labels_text=list(dataset.labels_text),
        blob=names.blob,
        ends=names.ends.astype("<i8").tobytes(),
        labels=dataset.labels.astype("<i4").tobytes(),
    )
    keep_file(dataset.root, _name(dataset.split), msgspec.msgpack.encode(stored), "index", len(dataset))


def _name(split: str) -> str:
    return f"index-{split}.bin"


def _decode(content: memoryview, split: str) -> _Stored | None:
    try:
        stored = msgspec.msgpack.decode(content, type=_Stored)
    except msgspec.MsgspecError:
        return None
    return stored if stored.version == VERSION and stored.split == os.fsencode(split) else None


def _is_current(stored: _Stored, root: Path) -> bool:
    if stored.scanned_ns > time.time_ns():
        return False
    newest_ns = stored.scanned_ns - SETTLE_NS
    return all(
        signature == signature_of(f"{root}/{os.fsdecode(name)}")
        and (signature is None or max(signature.changed_ns, signature.modified_ns) <= newest_ns)
        for name, signature in stored.watched
    )


def _dataset(stored: _Stored, root: Path, split: str) -> Dataset | None:
    """Make the dataset, unless an entry is not as we write it: the hash does not prove who wrote the file."""
    labels = np.frombuffer(stored.labels, dtype="<i4").astype(np.int64)
    ends = np.frombuffer(stored.ends, dtype="<i8").astype(np.int64)
    rising = bool((np.diff(ends, prepend=0) > 0).all()) and (not len(ends) or ends[-1] == len(stored.blob))
    known = not len(labels) or (labels.min() >= 0 and labels.max() < len(stored.classes))
    if len(labels) != len(ends) or not rising or not known or _leaves_the_folder(stored.blob, ends):
        log.info("the index of %s is not one of ours: listing the files again", printable(root))
        return None
    return Dataset(
        root=Path(root),
        split=split,
        paths=PackedStrings(stored.blob, ends),
        labels=labels,
        classes=tuple(os.fsdecode(name) for name in stored.classes),
        labels_text=tuple(stored.labels_text),
        folder_name=os.fsdecode(stored.folder),
        passed_over=stored.passed_over,
    )


def _leaves_the_folder(blob: bytes, ends: np.ndarray[tuple[int], np.dtype[np.int64]]) -> bool:
    """Whether a name could point out of its split's folder. A file's own name may hold dots, no `../`."""
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    firsts = np.frombuffer(blob, dtype=np.uint8)[starts]
    climbs = b".." in blob and (b"../" in blob or b"/.." in blob)  # one search instead of two, most often
    return climbs or b"\0" in blob or bool((firsts == ord("/")).any())
