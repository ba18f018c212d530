"""Reads, hashes and writes files: written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from data_pipeline.common.errors import FULL, CorruptFileError, ImageError, SaveError, UserError
from data_pipeline.common.image_kind import HEAD_BYTES, name_bytes
from data_pipeline.common.text import printable

_HASH_BYTES = 1 << 22
"""Bytes a read: large, since a thread that hashes waits for the interpreter between two reads."""
MAX_SMALL_BYTES = 1 << 20
"""Limit for a manifest or another of our JSON files, which have a hundredth of it."""


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
    """Read a manifest or the like, which may come from an untrusted source.

    Raises:
        CorruptFileError: it is not a regular file, or is larger than any of ours.
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
    """Replace a file: at any time the path holds the old content or the new, whole, on the disk."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_bytes(content)
        fsync_path(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # half a file would take what is left of a full disk
        raise
    fsync_path(path.parent)


@contextmanager
def writing_to(place: Path, instead: str) -> Iterator[None]:
    """Turn a failure to write into one line that names the place.

    Args:
        place: that the user named, or that lies in it.
        instead: what to do, such as "name another folder with --out".
    Raises:
        UserError: nothing can be written there: a read-only file system, no permission, a file in the way.
        SaveError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        kind = SaveError if error.errno in FULL else UserError
        raise kind(f"cannot write {printable(place)}: {error.strerror or error}; {instead}") from error


def check_writable(folder: Path, instead: str, file: Path | None = None) -> None:
    """Raise before the work what writing into a folder, which need not be there yet, would raise after it.

    Args:
        folder: the place.
        instead: see `writing_to`.
        file: in the folder, to be named in its place.
    Raises:
        UserError: as `writing_to`.
    """
    there = Path(folder)
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    with writing_to(file or folder, instead):
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{printable(there)} is not a folder")
        if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
            number = errno.EROFS if os.statvfs(there).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(number, os.strerror(number))


class RetryingAppendFile:
    """A file that grows by whole pieces. A piece that cannot be written is kept, and written before the next.

    Any thread may use it.

    Args:
        path: the file; it and its folder are made with the first piece.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: list[bytes] = []
        self._lock = threading.Lock()

    def append(self, piece: bytes) -> OSError | None:
        """Append a piece.

        Returns:
            The error that kept it, and the pieces before it, from being written; None if they are written.
        """
        with self._lock:
            self._kept.append(piece)
            try:
                self._write()
            except OSError as error:
                return error
            return None

    def sync(self) -> None:
        """Wait until all pieces are on the disk.

        Raises:
            OSError: they cannot be written; they are kept.
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
                        file.truncate(size_bytes)  # the next piece must not follow half of this one
                    raise
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
        self._kept.clear()


def user_cache() -> Path:
    """The user's cache folder: `$XDG_CACHE_HOME/alexnet`, or `~/.cache/alexnet`.

    Raises:
        OSError: a user without a home folder, as in some containers.
    Source: XDG Base Directory Specification.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alexnet"
    except RuntimeError as error:
        raise FileNotFoundError(f"no place for a cache: {error}") from error


def place_in_cache(name: str, purpose: str) -> Path:
    """A folder or file in the user's cache that the work at hand cannot do without.

    Args:
        name: relative to the cache.
        purpose: what a folder is wanted for, for the message.
    Raises:
        UserError: this user has no place for a cache.
    """
    try:
        return user_cache() / name
    except OSError as error:
        raise UserError(f"{error}: set XDG_CACHE_HOME to a folder for {purpose}") from error


MAX_FILE_BYTES = 800_000_000
"""The largest file that is read where no other limit is set."""


def read_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Read one regular file.

    Args:
        path: the file.
        max_bytes: a larger file is refused before it is read.
    Raises:
        ImageError: missing, unreadable, not a regular file (a pipe would wait for ever), empty, or too large.
    """
    try:
        descriptor = _open_unblocked(path)  # costs half of what a file object does
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise ImageError("not a regular file")
            if status.st_size > max_bytes:
                raise ImageError(f"file of {status.st_size} bytes is above the limit of {max_bytes}")
            data = os.read(descriptor, status.st_size)
            # a signal, or a network file system, may cut a read short
            while len(data) < status.st_size and (piece := os.read(descriptor, status.st_size - len(data))):
                data += piece
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path, which no file system has
        raise ImageError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not data:
        raise ImageError("empty file")
    return name_bytes(data, os.fspath(path))


def _open_unblocked(path: str | os.PathLike[str], flags: int = os.O_RDONLY) -> int:
    """Open a file to read it, without waiting for the writer of a pipe."""
    return os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)


def read_head(path: str | os.PathLike[str], size_bytes: int = HEAD_BYTES) -> bytes:
    """The first bytes of a file, by which its kind is told; none if it cannot be read or is not regular."""
    with suppress(OSError, ValueError), open(path, "rb", opener=_open_unblocked) as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file.read(size_bytes)
    return b""


IMAGE_SUFFIXES = frozenset(
    {
        ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo", ".png", ".apng", ".bmp",
        ".webp", ".tif", ".tiff", ".gif", ".pnm", ".pbm", ".pgm", ".ppm", ".avif", ".avifs", ".jp2", ".j2k",
        ".j2c", ".jpc", ".jpf", ".jpx", ".ico", ".tga",
    }
)  # fmt: skip
"""Files of these suffixes are taken for images when a folder is listed; what they are, their content says."""
LOOKED_FOR = ".jpg, .png, .webp and the other suffixes in docs/data.md, and images without suffix"
"""The same, for messages."""


def write_json(path: Path, value: Any) -> None:
    """Write a value as readable JSON, whole or not at all."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(value)) + b"\n")
