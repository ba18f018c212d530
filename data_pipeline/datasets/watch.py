"""Records the files and folders that a scan of the data looked at, to detect later changes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec


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
    except OSError:
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
