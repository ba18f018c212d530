"""Writing so that a file is whole or absent, and hashing to know that it still is."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from pathlib import Path
from typing import Any

import msgspec

from data_pipeline.common.errors import CorruptFileError, ImageError

_HASH_BYTES = 1 << 22
"""Large, since a thread that hashes waits for the interpreter between two pieces."""
MAX_SMALL_BYTES = 1 << 20
"""Of a manifest or another of our JSON files, which are a hundredth of it."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    return hash_of(path, "sha256")


def hash_of(path: Path, algorithm: str) -> str:
    """Hash of a file's content, in hexadecimal, by any algorithm that `hashlib` has."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    buffer = memoryview(bytearray(_HASH_BYTES))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
    return digest.hexdigest()


def read_small(path: Path) -> bytes:
    """Content of a manifest or the like, which may come from a stranger.

    Raises:
        CorruptFileError: it is no regular file, or larger than any of ours.
        OSError: it cannot be read.
    """
    if not path.is_file() and path.exists():
        raise CorruptFileError(f"{path} is no regular file")
    with path.open("rb") as file:
        content = file.read(MAX_SMALL_BYTES + 1)
    if len(content) > MAX_SMALL_BYTES:
        raise CorruptFileError(f"{path} is larger than {MAX_SMALL_BYTES} bytes, so it is none of ours")
    return content


def fsync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file so that the path holds either the old content or the new, whole, on the disk."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_bytes(content)
    fsync_path(temporary)
    temporary.replace(path)
    fsync_path(path.parent)


class RetryingAppendFile:
    """A file that grows by whole pieces. What the disk does not take is kept, and goes before what follows.

    Any thread may use it.

    Args:
        path: of the file; it and its folder are made when there is something to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: list[bytes] = []
        self._lock = threading.Lock()

    def append(self, piece: bytes) -> OSError | None:
        """Write a piece behind all others.

        Returns:
            Why it, and what was kept before, is not in the file yet, if so.
        """
        with self._lock:
            self._kept.append(piece)
            try:
                self._write()
            except OSError as error:
                return error
            return None

    def sync(self) -> None:
        """Return when all pieces so far are on the disk.

        Raises:
            OSError: the disk does not take them; they are kept.
        """
        with self._lock:
            self._write()
            if self.path.exists():
                fsync_path(self.path)

    def _write(self) -> None:
        if not self._kept:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                size_bytes = file.tell()
                content, written = memoryview(b"".join(self._kept)), 0
                try:
                    while written < len(content):
                        written += file.write(content[written:])
                except OSError:
                    if written:
                        file.truncate(size_bytes)  # half a piece would spoil the next
                    raise
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
        self._kept.clear()


def user_cache() -> Path:
    """The user's folder for what can be made again: `$XDG_CACHE_HOME/alexnet`, or `~/.cache/alexnet`.

    Raises:
        OSError: a user without a home folder, as in some containers.
    Source: XDG Base Directory Specification.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet"
    except RuntimeError as error:
        raise FileNotFoundError(f"no place for a cache: {error}") from error


MAX_FILE_BYTES = 800_000_000
"""The largest file that is read where nobody sets another limit."""


def read_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """All bytes of one regular file.

    Args:
        path: the file.
        max_bytes: a larger file is refused before it is read.
    Raises:
        ImageError: missing, unreadable, not a regular file (a pipe would wait for ever), empty, or too large.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a regular file")
        if status.st_size > max_bytes:
            raise ImageError(f"file of {status.st_size} bytes is above the limit of {max_bytes}")
        with open(path, "rb") as file:  # noqa: PTH123 - half the cost of Path.open for small files
            data = file.read()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the path, which no file system has
        raise ImageError(f"cannot be read: {error}") from error
    if not data:
        raise ImageError("empty file")
    return data


IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, whole or not at all."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value)) + b"\n")
