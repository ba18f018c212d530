"""Unpacking archives that nobody vouches for: plain files and folders, inside the target, and only so much.

Used for what was downloaded, where a checksum may be missing, or may be that of a hostile file.
"""

from __future__ import annotations

import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from data_pipeline.common.console import Progress, show_progress
from data_pipeline.common.errors import CorruptFileError, SaveError
from data_pipeline.common.text import printable, visible

_CHUNK_BYTES = 1 << 20
_MAX_NAME_BYTES = 1 << 20
_NAME_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)

_BROKEN = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    ValueError,
    OverflowError,
)


class BoundedTarInfo(tarfile.TarInfo):
    """A tar header whose extended name is not read if it claims to be gigabytes long."""

    def _proc_member(self, tar: tarfile.TarFile) -> BoundedTarInfo:
        if self.type in _NAME_HEADERS and self.size > _MAX_NAME_BYTES:
            raise tarfile.ReadError(f"an extended header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


def unpack(archive: Path, target: Path, *, max_bytes: int, max_files: int) -> None:
    """Unpack a zip or tar archive (also compressed) into a new folder.

    Args:
        archive: the file; its content says which kind it is.
        target: the folder to make.
        max_bytes: most bytes that may come out, counted as they do.
        max_files: most files that may come out.
    Raises:
        CorruptFileError: no whole archive, or one that holds a link, a device, a path that leaves the
            target, a name twice, or more than allowed. What was unpacked by then stays in `target`.
        SaveError: a full disk.
    """
    target.mkdir(parents=True)
    limits = _Limits(archive, max_bytes, max_files)
    try:
        with show_progress(f"unpack {archive.name}, files", None) as progress:
            if zipfile.is_zipfile(archive):
                _unpack_zip(archive, target, limits, progress)
            else:
                _unpack_tar(archive, target, limits, progress)
    except (CorruptFileError, SaveError):
        raise
    except (*_BROKEN, RuntimeError) as error:
        raise CorruptFileError(f"{printable(archive)} is no whole archive: {error}") from error
    except OSError as error:
        if error.errno is None:  # such as gzip's "not a gzipped file"
            raise CorruptFileError(f"{printable(archive)} is no whole archive: {error}") from error
        raise SaveError(f"{printable(target)} could not be written: {error.strerror}") from error


class _Limits:
    """Counts what comes out, and refuses what must not."""

    def __init__(self, archive: Path, max_bytes: int, max_files: int) -> None:
        self.archive, self.room, self.files = archive, max_bytes, max_files
        self.max_bytes, self.max_files = max_bytes, max_files
        self.names: set[str] = set()

    def refuse(self, why: str) -> CorruptFileError:
        return CorruptFileError(f"{printable(self.archive)} is refused: it {why}")

    def path(self, name: str, target: Path) -> Path:
        """Where a member goes: inside the target, and nowhere twice."""
        parts = name.rstrip("/").split("/")
        while parts and parts[0] == ".":
            parts = parts[1:]
        if name.startswith("/") or "\\" in name or "\0" in name or any(p in ("", ".", "..") for p in parts):
            raise self.refuse(f"holds a path that leaves its folder, {visible(name)!r}")
        return target.joinpath(*parts)

    def file(self, name: str) -> None:
        self.files -= 1
        if self.files < 0:
            raise self.refuse(f"holds more than {self.max_files} files")
        if name in self.names:
            raise self.refuse(f"holds {visible(name)!r} twice")
        self.names.add(name)

    def bytes(self, count: int) -> None:
        self.room -= count
        if self.room < 0:
            raise self.refuse(f"unpacks to more than {self.max_bytes} bytes")


def _unpack_zip(archive: Path, target: Path, limits: _Limits, progress: Progress) -> None:
    with zipfile.ZipFile(archive) as opened:
        members = opened.infolist()
        if len(members) > 2 * limits.max_files:
            raise limits.refuse(f"holds more than {limits.max_files} files")
        for member in members:
            path = limits.path(member.filename, target)
            kind = stat.S_IFMT(member.external_attr >> 16)
            if member.is_dir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            if kind not in (0, stat.S_IFREG):
                raise limits.refuse(f"holds a link or a device, {visible(member.filename)!r}")
            if member.flag_bits & 0x1:
                raise limits.refuse(f"holds an encrypted file, {visible(member.filename)!r}")
            limits.file(str(path))
            with opened.open(member) as content:
                _write(content, path, limits)
            progress.advance(1)


def _unpack_tar(archive: Path, target: Path, limits: _Limits, progress: Progress) -> None:
    with tarfile.open(archive, "r:*", tarinfo=BoundedTarInfo) as opened:
        for member in _members(opened):
            path = limits.path(member.name, target)
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            content = (
                opened.extractfile(member) if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) else None
            )
            if content is None:
                raise limits.refuse(f"holds a link or a device, {visible(member.name)!r}")
            limits.file(str(path))
            with content:
                _write(content, path, limits)
            progress.advance(1)
        # Python takes a tar that ends between two members, or within a header, for a whole one
        assert opened.fileobj is not None
        opened.fileobj.seek(opened.offset)
        if opened.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("its end is missing")


def _members(opened: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members one after the other, none kept in memory."""
    while (member := opened.next()) is not None:
        yield member
        opened.members.clear()  # type: ignore[attr-defined]


def _write(content: IO[bytes], path: Path, limits: _Limits) -> None:
    """Write one file. What lies in its way is another member, and refused, since links are never made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            while chunk := content.read(_CHUNK_BYTES):
                limits.bytes(len(chunk))
                file.write(chunk)
    except (FileExistsError, NotADirectoryError) as error:
        raise limits.refuse(f"holds {printable(path.name)!r} as a file and as a folder") from error
