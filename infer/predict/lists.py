"""Lists of paths, in files and on stdin; and an image that comes on stdin in place of one."""

from __future__ import annotations

import itertools
import os
import select
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_pipeline.common.errors import ImageError, UserError, raising
from data_pipeline.common.image_kind import HEAD_BYTES
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.common.text import printable, without_mark
from data_pipeline.decode.header import is_image_start
from data_pipeline.loader import ImageSource

STDIN = "-"
MAX_PATH_BYTES = 1 << 16
"""Of a line in a list: far above what Linux takes for a path."""
_PIECE = 1 << 16
_POLL_S = 0.1
_PACKED = {b"\x1f\x8b": "gzip", b"PK\3\4": "zip", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstd"}


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


def _pieces(stream: BinaryIO, stopped: threading.Event) -> Iterator[bytes]:
    """Reads a stream in pieces, as they come.

    Args:
        stream: of bytes.
        stopped: ends the stream early. It is looked at while nothing comes: a thread that waits in a read
            would wait for as long as the other side keeps the pipe open.
    """
    descriptor: int | None = None
    with suppress(OSError, ValueError, AttributeError):  # in memory, where nothing waits
        descriptor = stream.fileno()
    while not stopped.is_set():
        if descriptor is None or select.select([descriptor], [], [], _POLL_S)[0]:
            if not (piece := stream.read1(_PIECE)):  # type: ignore[attr-defined]
                return
            yield piece


def _read_first(pieces: Iterator[bytes]) -> bytes:
    """The beginning, long enough to tell what it is. A pipe may give less; a line of a list is enough."""
    first = b""
    while len(first) < HEAD_BYTES and not set(b"\n\0") & set(first) and (piece := next(pieces, b"")):
        first += piece
    return first


def read_list(path: str) -> PackedStrings:
    """Read the paths of a list in a file.

    Raises:
        UserError: it cannot be read, or is no list.
    """
    with raising(UserError, f"cannot read the list {printable(path)}"), Path(path).open("rb") as file:
        pieces = _pieces(file, threading.Event())
        first = _read_first(pieces)
        if is_image_start(first):
            raise UserError(f"{printable(path)} is an image and no list of paths: leave out the @")
        return PackedStrings.pack(_listed(pieces, path, first))


def read_piped(stream: BinaryIO, stopped: threading.Event) -> Iterator[str | ImageSource]:
    """Inputs from stdin: the paths of a list, or one image.

    Args:
        stream: stdin.
        stopped: ends the list.
    Raises:
        UserError: it is neither.
    """
    pieces = _pieces(stream, stopped)
    first = _read_first(pieces)
    if is_image_start(first):
        yield ImageSource(Path(STDIN), PipedImage(stream, first))
    else:
        yield from _listed(pieces, "stdin", first)


def _listed(pieces: Iterator[bytes], name: str, first: bytes) -> Iterator[str]:
    """Reads the paths of a list; they end with NULs if the first piece holds one (`find -print0`)."""
    begin, rest = without_mark(first, name), b""
    if kind := next((kind for mark, kind in _PACKED.items() if begin.startswith(mark)), None):
        raise UserError(f"{printable(name)} is a {kind} file and no list of paths: unpack it")
    if first[257:262] == b"ustar":
        raise UserError(f"{printable(name)} is a tar file and no list of paths: give it as shard.tar")
    end = b"\0" if b"\0" in begin else b"\n"
    for piece in itertools.chain([begin], pieces):
        *names, rest = (rest + piece).split(end)
        yield from _named(names, end)
        if len(rest) > MAX_PATH_BYTES:
            raise UserError(
                f"{printable(name)} is no list of paths: a line has more than {MAX_PATH_BYTES} bytes"
            )
    yield from _named([rest], end)


def _named(names: list[bytes], end: bytes) -> Iterator[str]:
    for name in names:
        name = name if end == b"\0" else name.removesuffix(b"\r")
        if name:
            yield os.fsdecode(name)
