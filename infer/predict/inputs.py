"""The inputs of a prediction: files, folders, globs, lists and tar shards, in order and in little memory."""

from __future__ import annotations

import glob
import io
import logging
import os
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from data_pipeline.common.errors import ImageError, UserError
from data_pipeline.common.files import LOOKED_FOR
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.common.passed_over import PassedOver
from data_pipeline.common.text import printable, without_mark
from data_pipeline.datasets.image_folder import walk_images
from data_pipeline.decode.header import TELLING_BYTES, is_image_start
from data_pipeline.loader import ImageSource
from data_pipeline.shards.shard_format import (
    COMPRESSED_SUFFIXES,
    UNPACK,
    takes_member,
    walk_tar,
    why_no_tar,
)

log = logging.getLogger("infer")

STDIN = "-"
LIST_MARK = "@"
SHARD_SUFFIX = ".tar"
MAX_PATH_BYTES = 1 << 16
"""Of a line in a list: far above what Linux takes for a path."""
_PIECE = 1 << 16
_PACKED = {b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstd"}

Item = Path | ImageSource
"""One input: a file, or an image that lies elsewhere."""


def path_of(item: Item) -> Path:
    """The path by which rows and messages name an input."""
    return item.path if isinstance(item, ImageSource) else item


class Inputs:
    """Inputs in order. Folders and lists are read at once and kept packed; shards and stdin when predicted.

    Args:
        lists: functions that give paths of images and tar shards, or an image that was read already.
        total: number of inputs; None if it is not known before the end.
        named: the files that the arguments name themselves: images, shards and lists.
        in_folders: what was passed over in folders.
    """

    def __init__(
        self,
        lists: Sequence[PackedStrings | Callable[[], Iterator[str | ImageSource]]],
        total: int | None,
        named: Sequence[str] = (),
        in_folders: PassedOver | None = None,
    ) -> None:
        self._lists = lists
        self.total, self.named = total, tuple(named)
        self._in_folders, self._in_shards = in_folders or PassedOver(), PassedOver()

    @property
    def passed_over(self) -> PassedOver:
        """The files that are no images, of folders and of the shards that have been read."""
        found = PassedOver()
        found.merge(self._in_folders)
        found.merge(self._in_shards)
        return found

    def files(self) -> Iterator[str]:
        """The files of images and shards, but those whose names come from stdin."""
        for paths in self._lists:
            if isinstance(paths, PackedStrings):
                yield from paths

    def __iter__(self) -> Iterator[Item]:
        self._in_shards = passed_over = PassedOver()
        for paths in self._lists:
            for path in paths if isinstance(paths, PackedStrings) else paths():
                if isinstance(path, ImageSource):
                    yield path
                elif path.endswith(SHARD_SUFFIX):
                    yield from _members(path, passed_over)
                elif path.endswith(COMPRESSED_SUFFIXES):
                    yield ImageSource(Path(path), Unreadable(f"a compressed tar: {UNPACK}"))
                else:
                    yield Path(path)


def find_inputs(
    arguments: Sequence[str | os.PathLike[str]], *, recursive: bool = True, stdin: BinaryIO | None = None
) -> Inputs:
    """The inputs that command-line arguments name.

    Args:
        arguments: each a file, whatever its suffix; a folder, whose images come in byte order; a tar shard,
            whose images come in the order of the tar; a glob (`**` enters folders), if no file has that name;
            `@list.txt`, a file of paths; or `-`, such a list on stdin, or one image. In a list, paths end
            with their line, or with a NUL if there is any; tar shards in it are read, and what cannot be read
            becomes an error row. Of folders and shards, files that are no images are passed over and counted.
        recursive: whether to enter folders inside folders.
        stdin: where `-` is read; None for the process's own.
    Raises:
        UserError: a file or folder that does not exist, a glob without a match, a file that is no list, a
            compressed tar, or no input at all.
    """
    lists: list[PackedStrings | Callable[[], Iterator[str | ImageSource]]] = []
    named: list[str] = []
    total: int | None = 0
    passed_over = PassedOver()
    for argument in arguments:
        argument = os.fspath(argument)
        if argument == STDIN:
            lists.append(partial(_piped, stdin or own_stdin()))
            total = None
            continue
        is_list = argument.startswith(LIST_MARK)
        named.append(argument[1:] if is_list else argument)
        paths = _read_list(argument[1:]) if is_list else _paths(argument, recursive, passed_over)
        lists.append(paths)
        if total is not None:
            # Nobody knows how many images a shard holds before it is read.
            total = None if any(path.endswith(SHARD_SUFFIX) for path in paths) else total + len(paths)
    if total == 0:
        where = ", ".join(printable(argument) for argument in arguments) or "an empty list of paths"
        raise UserError(
            f"no images in {where}{f', but {passed_over.sentence()}' * bool(passed_over)}: looked for "
            f"{LOOKED_FOR} (tar shards are read where they are named: shards/*.tar)"
        )
    return Inputs(lists, total, named, passed_over)


def _paths(argument: str, recursive: bool, passed_over: PassedOver) -> PackedStrings:
    """Paths of images and shards: a file itself, the images of a folder, or those of each match of a glob."""
    names = [argument]
    if not os.path.lexists(argument):
        if not glob.has_magic(argument):
            raise UserError(f"no such file or folder: {printable(argument)}")
        names = sorted(glob.glob(argument, recursive=recursive), key=os.fsencode)  # noqa: PTH207 - as typed
        if not names:
            raise UserError(f"no file or folder matches {printable(argument)}")
    return PackedStrings.pack(path for name in names for path in _paths_in(name, recursive, passed_over))


def _paths_in(name: str, recursive: bool, passed_over: PassedOver) -> Iterator[str]:
    if not Path(name).is_dir():
        if name.endswith(COMPRESSED_SUFFIXES):
            raise UserError(f"{printable(name)} is compressed: {UNPACK}")
        yield name
        return
    empty = True
    for path in walk_images(name, recursive, passed_over):
        empty = False
        yield str(Path(name, path))
    if empty:
        log.warning("no images in %s", printable(name))


def _read_list(path: str) -> PackedStrings:
    try:
        with Path(path).open("rb") as file:
            first = _first_piece(file)
            if is_image_start(first):
                raise UserError(f"{printable(path)} is an image and no list of paths: leave out the @")
            return PackedStrings.pack(_listed(file, path, first))
    except OSError as error:
        raise UserError(f"cannot read the list {printable(path)}: {error.strerror or error}") from error


def _piped(stream: BinaryIO) -> Iterator[str | ImageSource]:
    """What comes on stdin: the paths of a list, or one image."""
    first = _first_piece(stream)
    if is_image_start(first):
        yield ImageSource(Path(STDIN), PipedImage(stream, first))
    else:
        yield from _listed(stream, "stdin", first)


def own_stdin() -> BinaryIO:
    """Stdin without a buffer: Python would wait at its end for a thread that waits for more of that."""
    try:
        return cast(BinaryIO, io.FileIO(sys.stdin.fileno(), closefd=False))
    except io.UnsupportedOperation:  # not the process's own, but a caller's
        return sys.stdin.buffer


def _read_some(stream: BinaryIO) -> bytes:
    """What there is, at most a piece; nothing at the end."""
    some: bytes = getattr(stream, "read1", stream.read)(_PIECE)
    return some


def _first_piece(stream: BinaryIO) -> bytes:
    """The beginning, long enough to tell what it is: a pipe may give less, and a list's line is enough."""
    first = _read_some(stream)
    piece = first
    while piece and len(first) < TELLING_BYTES and b"\n" not in first:
        first += (piece := _read_some(stream))
    return first


def _listed(stream: BinaryIO, name: str, first: bytes) -> Iterator[str]:
    """Reads the paths of a list; they end with NULs if the first piece holds one (`find -print0`)."""
    piece, rest = without_mark(first, name), b""
    if kind := next((kind for mark, kind in _PACKED.items() if piece.startswith(mark)), None):
        raise UserError(f"{printable(name)} is a {kind} file and no list of paths: unpack it")
    if first[257:262] == b"ustar":
        raise UserError(f"{printable(name)} is a tar file and no list of paths: give it as shard.tar")
    end = b"\0" if b"\0" in piece else b"\n"
    while piece:
        *names, rest = (rest + piece).split(end)
        yield from _named(names, end)
        if len(rest) > MAX_PATH_BYTES:
            raise UserError(
                f"{printable(name)} is no list of paths: a line has more than {MAX_PATH_BYTES} bytes"
            )
        piece = _read_some(stream)
    yield from _named([rest], end)


def _named(names: list[bytes], end: bytes) -> Iterator[str]:
    for name in names:
        name = name if end == b"\0" else name.removesuffix(b"\r")
        if name:
            yield os.fsdecode(name)


def _members(shard: str, passed_over: PassedOver) -> Iterator[ImageSource]:
    """Finds the images of a tar shard by its headers alone; damage becomes one last input that fails."""
    found = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in walk_tar(tar):
                if (taken := takes_member(tar, member)) is False:
                    passed_over.add(member.name)
                elif taken:
                    found += 1
                    plain = member.isreg() and not member.issparse()
                    read = ShardMember(shard, member.offset_data, member.size) if plain else _NO_FILE
                    yield ImageSource(Path(shard, member.name.lstrip("/")), read)
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = why_no_tar(Path(shard), error, f", {found} images before the damage")
        yield ImageSource(Path(shard), Unreadable(reason))


@dataclass(frozen=True)
class ShardMember:
    """Reads one image of a tar shard.

    Attributes:
        shard: the tar file.
        offset: position of the image's first byte.
        size_bytes: length of the image.
    """

    shard: str
    offset: int
    size_bytes: int

    def __call__(self, max_bytes: int) -> bytes:
        if self.size_bytes > max_bytes:
            raise ImageError(f"file of {self.size_bytes} bytes is above the limit of {max_bytes}")
        try:
            with open(self.shard, "rb") as file:  # noqa: PTH123 - half the cost of Path.open for small files
                file.seek(self.offset)
                data = file.read(self.size_bytes)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error
        if len(data) < self.size_bytes:
            raise ImageError(f"the shard ends after {len(data)} of {self.size_bytes} bytes")
        return data


@dataclass(frozen=True)
class PipedImage:
    """Reads the one image that comes on stdin.

    Attributes:
        stream: stdin.
        first: what was read of it already.
    """

    stream: BinaryIO
    first: bytes

    def __call__(self, max_bytes: int) -> bytes:
        data = self.first + self.stream.read(max(0, max_bytes + 1 - len(self.first)))
        if len(data) > max_bytes:
            raise ImageError(f"more than the limit of {max_bytes} bytes")
        return data


@dataclass(frozen=True)
class Unreadable:
    """Fails to read an input that is known to be bad, with the reason."""

    reason: str

    def __call__(self, max_bytes: int) -> bytes:
        raise ImageError(self.reason)


_NO_FILE = Unreadable("a link or another thing in a tar shard that is no plain file: it is not followed")
