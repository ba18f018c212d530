"""The bounded cache of shards that are elsewhere: who uses what, what makes room, and who fetches.

    <user's cache>/shards/<id>/<name>/     the shards of one address and one manifest
    <user's cache>/shards/<id>/size_bytes  how much room it takes, or will; its time is that of the last use
    <user's cache>/shards/locks/           files that processes lock: the system frees them when one ends

Nothing that a process uses is removed. The locks are those of `flock`, held until a process ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import write_atomic
from data_pipeline.common.text import printable

log = logging.getLogger("data_pipeline")

DEFAULT_GB = 200.0
_SIZE, _REMOVING = "size_bytes", ".removing-"
_held: dict[Path, int] = {}  # descriptors of the locks that this process keeps


def hold(root: Path, id: str) -> None:
    """Keep a set of shards from being removed until this process ends."""
    path = _lock_path(root, f"{id}.use")
    if path not in _held:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        _lock(descriptor, fcntl.LOCK_SH, path)
        _held[path] = descriptor


@contextmanager
def alone(root: Path, name: str, waiting: str = "") -> Iterator[None]:
    """Be the only process of this machine here.

    Args:
        root: the cache.
        name: of the lock.
        waiting: a line for the log where another process is there already.
    """
    path = _lock_path(root, name)
    with path.open("ab") as file:
        if not _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, path):
            if waiting:
                log.info("%s", waiting)
            _lock(file.fileno(), fcntl.LOCK_EX, path)
        yield


def reserve(root: Path, id: str, needed_bytes: int, missing_bytes: int, limit_bytes: int, what: str) -> None:
    """Make room for a set of shards: those that were used longest ago go first, and none that is in use.

    Args:
        root: the cache.
        id: of the set.
        needed_bytes: what it takes as a whole.
        missing_bytes: what of that is still to be written.
        limit_bytes: of the cache.
        what: names the set in messages.
    Raises:
        UserError: the cache, or the disk, is too small.
    """
    size = f"{what} takes {needed_bytes / 1e9:.3g} GB"
    if needed_bytes > limit_bytes:
        raise UserError(
            f"{size}, and the cache of shards holds {limit_bytes / 1e9:.3g} (data.remote_cache_gb): set it "
            "higher, or copy the shards to a folder"
        )
    with alone(root, "room"):
        _make_room(root, id, limit_bytes - needed_bytes, size)
        free = shutil.disk_usage(root).free
        if missing_bytes > free:
            raise UserError(
                f"{what}: {missing_bytes / 1e9:.3g} GB are to be fetched, and {printable(root)} has "
                f"{free / 1e9:.3g} free: make room there, or set XDG_CACHE_HOME to another place"
            )
        (root / id).mkdir(exist_ok=True)
        write_atomic(root / id / _SIZE, str(needed_bytes).encode())


def _make_room(root: Path, id: str, room_bytes: int, size: str) -> None:
    for leftover in root.glob(f"{_REMOVING}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    others = {
        path.parent: int(path.read_bytes()) for path in root.glob(f"*/{_SIZE}") if path.parent.name != id
    }
    for folder in sorted(others, key=lambda folder: (folder / _SIZE).stat().st_mtime_ns):
        if sum(others.values()) <= room_bytes:
            return
        path = _lock_path(root, f"{folder.name}.use")
        with path.open("ab") as file:
            if _lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, path):  # nobody uses it
                log.info("%s makes room in the cache of shards", printable(folder))
                gone = folder.rename(root / f"{_REMOVING}{folder.name}")
                shutil.rmtree(gone, ignore_errors=True)
                del others[folder]
    if sum(others.values()) > room_bytes:
        raise UserError(
            f"{size}, and running processes use {sum(others.values()) / 1e9:.3g} GB of the cache of shards "
            "(data.remote_cache_gb): set it higher, or wait for them"
        )


def _lock(descriptor: int, kind: int, path: Path) -> bool:
    """Take a lock, or return False where another process has it and `kind` says not to wait."""
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{printable(path)} cannot be locked ({error.strerror}): set XDG_CACHE_HOME to a folder on "
            "a disk of this machine"
        ) from error
    return True


def _lock_path(root: Path, name: str) -> Path:
    folder = root / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / name
