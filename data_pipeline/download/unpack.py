"""Unpacks untrusted archives: plain files and folders, inside the target, up to a limit of files and bytes.

An archive was downloaded; its checksum may be missing, or be that of a hostile file.
"""

from __future__ import annotations

import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from itertools import dropwhile
from pathlib import Path
from typing import IO, NamedTuple

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import CorruptFileError, SaveError
from data_pipeline.common.text import printable, visible
from data_pipeline.shards.shard_format import walk_tar

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
    RuntimeError,
)


class _RefusedError(Exception):
    """An archive that holds what must not be unpacked."""


class _Member(NamedTuple):
    """One member of an archive.

    Attributes:
        name: its path, as the archive has it.
        is_folder: whether it is a folder.
        fault: what it is, if it is neither a folder nor a plain file.
        open: opens its content.
    """

    name: str
    is_folder: bool
    fault: str
    open: Callable[[], IO[bytes] | None]


class BoundedTarInfo(tarfile.TarInfo):
    """A tar header whose extended name is not read if it claims to be gigabytes long."""

    def _proc_member(self, tar: tarfile.TarFile) -> BoundedTarInfo:
        if self.type in _NAME_HEADERS and self.size > _MAX_NAME_BYTES:
            raise tarfile.ReadError(f"an extended header of {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc,no-any-return]


def unpack(archive: Path, target: Path, *, max_bytes: int, max_files: int) -> None:
    """Unpack a zip or tar archive (also compressed) into a new folder.

    Args:
        archive: the file; its content decides which kind it is.
        target: the folder to make.
        max_bytes: most bytes that may come out, counted as they do.
        max_files: most files that may come out.
    Raises:
        CorruptFileError: no whole archive, or one that holds a link, a device, a path that leaves the
            target, a name twice, or more than allowed. What was unpacked by then stays in `target`.
        SaveError: a full disk.
    """
    target.mkdir(parents=True)
    try:
        _unpack(archive, target, max_bytes, max_files)
    except _RefusedError as error:
        raise CorruptFileError(f"{printable(archive)} is refused: it {error}") from error
    except _BROKEN as error:
        raise CorruptFileError(f"{printable(archive)} is no whole archive: {error}") from error
    except OSError as error:
        if error.errno is None:  # such as gzip's "not a gzipped file"
            raise CorruptFileError(f"{printable(archive)} is no whole archive: {error}") from error
        raise SaveError(f"{printable(target)} could not be written: {error.strerror}") from error


def _unpack(archive: Path, target: Path, max_bytes: int, max_files: int) -> None:
    num_files, room = 0, max_bytes
    members = _zip_members(archive) if zipfile.is_zipfile(archive) else _tar_members(archive)
    with show_progress(f"unpack {archive.name}, files", None) as progress, closing(members):
        for member in members:
            path = _path_in(target, member.name)
            if member.is_folder:
                path.mkdir(parents=True, exist_ok=True)
                continue
            if member.fault or (content := member.open()) is None:
                raise _RefusedError(f"holds {member.fault}, {visible(member.name)!r}")
            num_files += 1
            if num_files > max_files:
                raise _RefusedError(f"holds more than {max_files} files")
            with content, _create(path) as file:
                while chunk := content.read(_CHUNK_BYTES):
                    room -= len(chunk)
                    if room < 0:
                        raise _RefusedError(f"unpacks to more than {max_bytes} bytes")
                    file.write(chunk)
            progress.advance(1)


def _path_in(target: Path, name: str) -> Path:
    parts = list(dropwhile(lambda part: part == ".", name.rstrip("/").split("/")))
    if name.startswith("/") or "\\" in name or "\0" in name or any(p in ("", ".", "..") for p in parts):
        raise _RefusedError(f"holds a path that leaves its folder, {visible(name)!r}")
    return target.joinpath(*parts)


def _create(path: Path) -> IO[bytes]:
    """Make one file. One in its way is another member: links, which could lead elsewhere, are never made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("xb")
    except (FileExistsError, NotADirectoryError) as error:
        how = "twice" if path.is_file() else "as a file and as a folder"
        raise _RefusedError(f"holds {printable(path.name)!r} {how}") from error


def _zip_members(archive: Path) -> Generator[_Member, None, None]:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            fault = ""
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
                fault = "a link or a device"
            elif member.flag_bits & 0x1:
                fault = "an encrypted file"
            yield _Member(member.filename, member.is_dir(), fault, partial(opened.open, member))


def _tar_members(archive: Path) -> Generator[_Member, None, None]:
    with tarfile.open(archive, "r:*", tarinfo=BoundedTarInfo) as opened:
        for member in walk_tar(opened):
            plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
            fault = "" if plain else "a link or a device"
            yield _Member(member.name, member.isdir(), fault, partial(opened.extractfile, member))
