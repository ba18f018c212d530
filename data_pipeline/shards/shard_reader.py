"""Reads samples out of tar shards: single ones through few open files, or batches of them without copies.

The tar header before an image is compared with what the shard's index says: one header, or many at once.

Legend: N headers of B = 512 bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from data_pipeline.common.errors import ImageError
from data_pipeline.common.image_kind import name_bytes
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.shards.mapped_shards import ShardFiles
from data_pipeline.shards.shard_format import BLOCK

Int = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

_NO_IMAGE = np.frombuffer(b"", dtype=np.uint8)

# fields of a tar header
_NAME = 100
"""Bytes of the name's field. A longer name stands in a header of its own, and is not compared."""
_CHECKSUM, _SIZE, _TYPE, _PREFIX = slice(148, 156), slice(124, 136), 156, 345
_SPACE, _ZERO = ord(" "), ord("0")


@dataclass(eq=False)
class ShardReader:
    """The samples of a split in its tar shards.

    Attributes:
        shards: the tar files, relative to the data folder.
        files: the same, opened or mapped into memory as they are needed.
        shard_of: (N) which shard holds each sample.
        offsets: (N) where its image begins, in bytes.
        sizes: (N) the image's bytes.
        members: (N) the image's name in the tar.
    """

    shards: tuple[str, ...]
    files: ShardFiles
    shard_of: Int
    offsets: Int
    sizes: Int
    members: PackedStrings
    # the samples whose header `views` has compared, and how often the shards had been written to by then
    _checked: npt.NDArray[np.bool_] = field(init=False, default_factory=lambda: np.empty(0, np.bool_))
    _num_changes: int = field(init=False, default=-1)

    def read(self, index: int, max_bytes: int) -> bytes:
        """The bytes of one sample, if the tar header before them is that of the member the index names."""
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        if size > max_bytes:
            raise ImageError(f"file of {size} bytes is above the limit of {max_bytes}")
        try:
            data = self.files.read(int(self.shard_of[index]), size + BLOCK, offset - BLOCK)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error
        if len(data) < size + BLOCK:
            raise ImageError("its shard has become shorter than its index says")
        if not header_fits(data[:BLOCK], self.members[index], size):
            raise ImageError("its shard and the shard's index do not fit each other")
        if not size:
            raise ImageError("empty file")
        return name_bytes(data[BLOCK:], self.members[index])

    def views(self, indices: Int) -> tuple[list[Bytes], npt.NDArray[np.bool_]]:
        """The bytes of a batch, in the shards' memory: nothing is copied, and no file is opened.

        The header before each image is compared as `read` does, the first time and after the shard was
        written to. Shards that have become shorter are found here; one that is truncated while a view of it
        is in use kills the process (SIGBUS).

        Args:
            indices: (n) which samples.
        Returns:
            n read-only arrays of uint8, and (n) whether each holds its image. One that does not is empty:
            `read` tells why, or reads it all the same.
        """
        shard_of, sizes = self.shard_of[indices].tolist(), self.sizes[indices]
        begins = self.offsets[indices]
        shards = {shard: self.files.bytes_of(shard) for shard in set(shard_of)}
        views = []
        for shard, begin, end in zip(shard_of, begins.tolist(), (begins + sizes).tolist(), strict=True):
            content = shards[shard]
            inside = content is not None and begin >= BLOCK and end <= content.size
            views.append(content[begin:end] if content is not None and inside else _NO_IMAGE)
        there = (np.fromiter(map(len, views), np.int64, len(views)) == sizes) & (sizes > 0)
        if (num_changes := self.files.num_changes) != self._num_changes:
            self._checked, self._num_changes = np.zeros(len(self.sizes), np.bool_), num_changes
        checked = self._checked
        valid: npt.NDArray[np.bool_] = there & checked[indices]
        unsure = np.flatnonzero(there & ~valid)
        if len(unsure):
            headers = [_header(shards[shard_of[place]], int(begins[place])) for place in unsure.tolist()]
            fits = headers_fit(np.stack(headers), self.members.take(indices[unsure]), sizes[unsure])
            valid[unsure] = checked[indices[unsure]] = fits
            for place in unsure[~fits].tolist():
                views[place] = _NO_IMAGE
        return views, valid

    def read_ahead(self, indices: Int) -> None:
        """Have the system read a batch from the disk, where that pays, without waiting for it.

        Args:
            indices: which samples; `views` of them come later.
        """
        if not self.files.is_cold():
            return
        shard_of, offsets, sizes = self.shard_of[indices], self.offsets[indices], self.sizes[indices]
        order = np.argsort(shard_of, kind="stable")
        shards, firsts = np.unique(shard_of[order], return_index=True)
        for shard, places in zip(shards.tolist(), np.split(order, firsts[1:]), strict=True):
            self.files.read_ahead(shard, offsets[places] - BLOCK, sizes[places] + BLOCK)

    def name_at(self, index: int) -> str:
        """Such as `train/shard-000000.tar/00000123.jpg`."""
        return f"{self.shards[int(self.shard_of[index])]}/{self.members[index]}"

    def take(self, indices: Int) -> ShardReader:
        """The reader of some of the samples; it shares the open files."""
        return replace(
            self,
            shard_of=self.shard_of[indices],
            offsets=self.offsets[indices],
            sizes=self.sizes[indices],
            members=self.members.take(indices),
        )


def _header(content: Bytes | None, begin: int) -> Bytes:
    assert content is not None  # since its image is there
    return content[begin - BLOCK : begin]


def header_fits(header: bytes, member: str, size: int) -> bool:
    """Whether a tar header is sound, and that of a regular file of this name and size."""
    try:
        checksum = int(header[_CHECKSUM].strip(b" \0") or b"-1", 8)
        stored = int(header[_SIZE].strip(b" \0") or b"-1", 8)
    except ValueError:
        return False
    sound = checksum == sum(header) - sum(header[_CHECKSUM]) + 8 * _SPACE
    name = os.fsencode(member)
    same = len(name) >= _NAME or header[_PREFIX] != 0 or header[:_NAME].rstrip(b"\0") == name
    return sound and stored == size and header[_TYPE] in (0, _ZERO) and same


def headers_fit(headers_NB: Bytes, members: PackedStrings, sizes: Int) -> npt.NDArray[np.bool_]:
    """`header_fits` for many headers, in a few array operations.

    Args:
        headers_NB: (N, 512) uint8.
        members: N names.
        sizes: (N) bytes of each image.
    Returns:
        (N) bool. False also for some headers that `header_fits` accepts, with numbers that no tar writes.
    """
    checksums = headers_NB.sum(axis=1, dtype=np.uint32).astype(np.int64)
    checksums -= headers_NB[:, _CHECKSUM].sum(axis=1, dtype=np.int64) - 8 * _SPACE
    kinds = headers_NB[:, _TYPE]
    fits: npt.NDArray[np.bool_] = (kinds == 0) | (kinds == _ZERO)
    fits &= _octal(headers_NB[:, _CHECKSUM]) == checksums
    fits &= _octal(headers_NB[:, _SIZE]) == sizes
    fits &= _names_fit(headers_NB, members)
    return fits


def _octal(fields_NW: Bytes) -> Int:
    """The number in each field: octal digits side by side among spaces and zero bytes; else -1."""
    digits = fields_NW - np.uint8(_ZERO)  # what is below "0" becomes large
    is_digit = digits < 8
    blank = (fields_NW == 0) | (fields_NW == _SPACE)
    # a number begins where a digit follows none
    begins = is_digit[:, 0] + (is_digit[:, 1:] & ~is_digit[:, :-1]).sum(axis=1)
    behind = np.cumsum(is_digit[:, ::-1], axis=1, dtype=np.int64)[:, ::-1] - is_digit  # digits to the right
    numbers: Int = ((digits.astype(np.int64) << 3 * behind) * is_digit).sum(axis=1)
    numbers[(begins != 1) | ~(is_digit | blank).all(axis=1)] = -1
    return numbers


def _names_fit(headers_NB: Bytes, members: PackedStrings) -> npt.NDArray[np.bool_]:
    long = np.diff(members.ends, prepend=0) >= _NAME
    expected = members.padded(np.arange(len(members)), min_width=_NAME)[:, :_NAME]
    fits: npt.NDArray[np.bool_] = (headers_NB[:, :_NAME] == expected).all(axis=1)
    fits |= long | (headers_NB[:, _PREFIX] != 0)
    return fits
