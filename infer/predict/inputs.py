"""The inputs of a prediction: files, folders, globs, lists and tar shards, in order and in little memory.

From Python, arrays and Pillow images too: they are encoded without loss, and then decoded as files are.
"""

from __future__ import annotations

import glob
import io
import logging
import os
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.common.errors import ImageError, UserError
from data_pipeline.common.files import LOOKED_FOR
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.common.passed_over import PassedOver
from data_pipeline.common.text import printable
from data_pipeline.datasets.image_folder import walk_images
from data_pipeline.loader import ImageSource
from data_pipeline.shards.shard_format import COMPRESSED_SUFFIXES, UNPACK, takes_member, walk_tar, why_no_tar
from infer.predict.lists import STDIN, read_list, read_piped

log = logging.getLogger("infer")

LIST_MARK = "@"
SHARD_SUFFIX = ".tar"
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I"})
"""Modes that PNG can hold; the others, CMYK among them, become RGB first."""

Item = Path | ImageSource
"""One input: a file, or an image that lies elsewhere."""


def path_of(item: Item) -> Path:
    """The path by which rows and messages name an input."""
    return item.path if isinstance(item, ImageSource) else item


@dataclass
class Inputs:
    """Inputs in order. Folders and lists are read at once and kept packed; shards and stdin when predicted.

    Attributes:
        total: number of inputs; None if it is not known before the end.
        lists: paths of images and tar shards, or functions that give them, or an image that was read already.
        named: the files that the arguments name themselves: images, shards and lists.
        in_folders: what was passed over in folders.
        in_shards: what was passed over in the shards that have been read.
        stopped: ends a list on stdin for which another thread waits.
    """

    total: int | None = 0
    lists: list[PackedStrings | Callable[[], Iterator[str | ImageSource]]] = field(default_factory=list)
    named: list[str] = field(default_factory=list)
    in_folders: PassedOver = field(default_factory=PassedOver)
    in_shards: PassedOver = field(default_factory=PassedOver)
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def passed_over(self) -> PassedOver:
        """The files that are no images, of folders and of the shards that have been read."""
        found = PassedOver()
        found.merge(self.in_folders)
        found.merge(self.in_shards)
        return found

    def files(self) -> Iterator[str]:
        """The files of images and shards, but those whose names come from stdin."""
        for paths in self.lists:
            if isinstance(paths, PackedStrings):
                yield from paths

    def __iter__(self) -> Iterator[Item]:
        self.in_shards = passed_over = PassedOver()
        for paths in self.lists:
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
    found = Inputs()
    for argument in [os.fspath(one) for one in arguments]:
        if argument == STDIN:
            found.lists.append(partial(read_piped, stdin or sys.stdin.buffer, found.stopped))
            found.total = None
            continue
        is_list = argument.startswith(LIST_MARK)
        found.named.append(argument[1:] if is_list else argument)
        paths = read_list(argument[1:]) if is_list else _paths(argument, recursive, found.in_folders)
        found.lists.append(paths)
        # Nobody knows how many images a shard holds before it is read.
        if found.total is None or any(path.endswith(SHARD_SUFFIX) for path in paths):
            found.total = None
        else:
            found.total += len(paths)
    if found.total == 0:
        where = ", ".join(map(printable, arguments)) or "an empty list of paths"
        but = f", but {found.in_folders.sentence()}" if found.in_folders else ""
        raise UserError(
            f"no images in {where}{but}: looked for {LOOKED_FOR} (tar shards are read where they are named: "
            "shards/*.tar)"
        )
    return found


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
class Unreadable:
    """Fails to read an input that is known to be bad, with the reason."""

    reason: str

    def __call__(self, max_bytes: int) -> bytes:
        raise ImageError(self.reason)


_NO_FILE = Unreadable("a link or another thing in a tar shard that is no plain file: it is not followed")


def from_pixels(pixels: NDArray[Any] | Image.Image, number: int) -> ImageSource:
    """An array or a Pillow image as an input.

    Args:
        pixels: uint8 (height, width, 3) in RGB or (height, width) in gray; or a Pillow image, whose EXIF
            orientation is applied, as it is to a file. Read when its batch is; do not change it before its
            row has come.
        number: its place among the inputs, by which its row is named.
    """
    encode: Callable[..., bytes] = _encode_image if isinstance(pixels, Image.Image) else _encode_array
    return ImageSource(Path(f"<input {number}>"), partial(encode, pixels))


def _encode_array(array: NDArray[Any], max_bytes: int) -> bytes:
    gray = array.ndim == 2
    if array.dtype != np.uint8 or not (gray or (array.ndim == 3 and array.shape[2] == 3)) or 0 in array.shape:
        raise ImageError(
            f"an array of {array.dtype} and shape {array.shape}: expected uint8 (height, width, 3), RGB, "
            "or (height, width), gray"
        )
    return _save(Image.fromarray(array), "BMP", max_bytes)


def _encode_image(image: Image.Image, max_bytes: int) -> bytes:
    try:
        exif = image.info.get("exif") or image.getexif().tobytes()
        in_png = image if image.mode in _PNG_MODES else image.convert("RGB")
        return _save(in_png, "PNG", max_bytes, compress_level=1, exif=exif)
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"this Pillow image cannot be read: {error}") from error


def _save(image: Image.Image, format: str, max_bytes: int, **options: Any) -> bytes:
    size_bytes = image.width * image.height * max(1, len(image.getbands()))
    if size_bytes > max_bytes:
        raise ImageError(f"{image.width} x {image.height} pixels are above the limit")
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
