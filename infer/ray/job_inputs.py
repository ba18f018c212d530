"""The inputs of a part, written down so that a worker on another machine reads the same ones, or says so."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from data_pipeline.common.errors import ImageError, UserError
from data_pipeline.common.files import read_file
from data_pipeline.common.text import printable
from data_pipeline.loader import ImageSource
from infer.predict.inputs import ShardMember, Unreadable
from infer.predict.rows import Item, path_of

MAX_WITNESSES = 8
WITNESS_BYTES = 1 << 16


class FileInput(msgspec.Struct, frozen=True, tag="file", array_like=True):
    """A file, by its path as it was given."""

    path: bytes


class MemberInput(msgspec.Struct, frozen=True, tag="member", array_like=True):
    """An image in a tar shard, and its place there."""

    path: bytes
    shard: bytes
    offset: int
    size_bytes: int


class FailedInput(msgspec.Struct, frozen=True, tag="failed", array_like=True):
    """An input that is known to fail, such as the rest of a damaged shard."""

    path: bytes
    reason: str


Input = FileInput | MemberInput | FailedInput


class Witness(msgspec.Struct, frozen=True, array_like=True):
    """What the machine that made the plan read at the beginning of one input: a worker must read the same."""

    place: int
    sha256: str


class PartInputs(msgspec.Struct, frozen=True, array_like=True):
    """The inputs of one part, and witnesses for the folders and shards that they lie in."""

    inputs: tuple[Input, ...]
    witnesses: tuple[Witness, ...]


def input_of(item: Item) -> Input:
    path = os.fsencode(path_of(item))
    if not isinstance(item, ImageSource):
        return FileInput(path)
    read = item.read
    if isinstance(read, ShardMember):
        return MemberInput(path, os.fsencode(read.shard), read.offset, read.size_bytes)
    if isinstance(read, Unreadable):
        return FailedInput(path, printable(read.reason))
    raise UserError(f"{printable(item.path)} is in this process's memory: a cluster needs files or shards")


def item_of(one: Input, base: Path) -> Item:
    """An input as prediction takes it: named as it was given, and read from `base` on."""
    path = Path(os.fsdecode(one.path))
    if isinstance(one, FailedInput):
        return ImageSource(path, Unreadable(one.reason))
    if isinstance(one, MemberInput):
        shard = os.fsdecode(os.path.join(os.fsencode(base), one.shard))  # noqa: PTH118 - bytes
        return ImageSource(path, ShardMember(shard, one.offset, one.size_bytes))
    return path if path.is_absolute() else ImageSource(path, _ReadFile(base / path))


def witness_of(one: Input, base: Path) -> str | None:
    """The hash of an input's first bytes; None for what cannot be read."""
    try:
        if isinstance(one, MemberInput):
            read = ShardMember(
                os.fsdecode(os.path.join(os.fsencode(base), one.shard)),  # noqa: PTH118 - bytes
                one.offset,
                min(one.size_bytes, WITNESS_BYTES),
            )
            return hashlib.sha256(read(WITNESS_BYTES)).hexdigest()
        if isinstance(one, FileInput):
            path = base / os.fsdecode(one.path)
            if path.is_file():
                with path.open("rb") as file:
                    return hashlib.sha256(file.read(WITNESS_BYTES)).hexdigest()
    except (ImageError, OSError, ValueError):
        pass
    return None


def witnesses_of(group: tuple[Input, ...], base: Path) -> tuple[Witness, ...]:
    """One for each folder and shard, up to a few: enough to tell that a worker sees another disk."""
    found: dict[bytes, Witness] = {}
    for place, one in enumerate(group):
        where = one.shard if isinstance(one, MemberInput) else os.path.dirname(one.path)  # noqa: PTH120 - bytes
        if (
            len(found) < MAX_WITNESSES
            and where not in found
            and (sha256 := witness_of(one, base)) is not None
        ):
            found[where] = Witness(place, sha256)
    return tuple(found.values())


@dataclass(frozen=True)
class _ReadFile:
    path: Path

    def __call__(self, max_bytes: int) -> bytes:
        return read_file(self.path, max_bytes)
