"""Reads and checks the files of a sharded dataset: its manifest, and the index beside each shard."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from data_pipeline.common.errors import CorruptFileError, UserError, raising
from data_pipeline.common.files import IMAGE_SUFFIXES, read_head
from data_pipeline.common.image_kind import HEAD_BYTES, is_image_head
from data_pipeline.common.text import printable

T = TypeVar("T")

FORMAT = 1
MANIFEST = "dataset.json"
BLOCK = 512
"""Tar's unit: a header is one block, and content is filled up to whole ones."""

COMPRESSED_SUFFIXES = (
    ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4", ".tar.Z",
)  # fmt: skip
UNPACK = "shards are read at any place, so unpack it to .tar first, with gunzip or the like"
"""Advice for a compressed shard, in messages."""
_COMPANIONS = (".cls", ".json", ".txt")
_COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")

_MAX_INDEX_BYTES = 1 << 30
_SEAL = b',"seal":"'


class ShardEntry(msgspec.Struct, frozen=True):
    """One shard in the manifest."""

    name: str
    num_samples: int
    size_bytes: int
    sha256: str


class ShardManifest(msgspec.Struct, frozen=True, kw_only=True):
    """`dataset.json`, which describes all shards. `plan` is a hash of the source's names and the settings."""

    format: int
    classes: list[str]
    labels_text: list[str]
    plan: str
    resize_px: int | None
    quality: int | None
    splits: dict[str, list[ShardEntry]]


class ShardIndex(msgspec.Struct, frozen=True, kw_only=True):
    """The index of one shard; the lists have an entry for each sample, in the order of the tar.

    The last five lists are what a look at each image found, see `data_pipeline.datasets.sample_table`.

    Attributes:
        plan: as in the manifest; empty for a shard from elsewhere.
        size_bytes: of the whole shard.
        sha256: of the whole shard; empty for a shard from elsewhere.
        numbers: place of each sample in the dataset.
        names: original name of each sample, relative to its split's folder.
        members: the image's name in the tar.
        offsets: where the image's bytes begin.
        sizes: how many bytes it has.
        labels: its class, 0-based.
        heights, widths: of the upright image, in pixels.
        kinds: of file, see `data_pipeline.common.image_kind`.
        orientations: EXIF orientation, 1..8.
        direct: 1 where DALI may read the file, else 0.
    """

    format: int
    plan: str
    size_bytes: int
    sha256: str
    numbers: list[int]
    names: list[str]
    members: list[str]
    offsets: list[int]
    sizes: list[int]
    labels: list[int]
    heights: list[int]
    widths: list[int]
    kinds: list[int]
    orientations: list[int]
    direct: list[int]


_COLUMNS = (
    "numbers", "names", "members", "offsets", "sizes", "labels", "kinds", "heights", "widths", "orientations",
    "direct",
)  # fmt: skip
"""Of an index: of the shard, and from the kinds on, of a look at each image."""


def make_index(
    rows: Iterable[tuple[int | str, ...]], *, size_bytes: int, plan: str = "", sha256: str = ""
) -> ShardIndex:
    """Make the index of a shard; see `ShardIndex`.

    Args:
        rows: for each sample a value of each column; without those of a look where nobody has looked yet.
        size_bytes, plan, sha256: as in the index.
    """
    columns = dict.fromkeys(_COLUMNS, ()) | dict(zip(_COLUMNS, zip(*rows, strict=True), strict=False))
    lists: dict[str, Any] = {name: list(column) for name, column in columns.items()}
    return ShardIndex(format=FORMAT, plan=plan, size_bytes=size_bytes, sha256=sha256, **lists)


def shard_files(folder: Path, name: str = "*") -> list[Path]:
    """The tar files in a folder, in byte order.

    Args:
        folder: where to look.
        name: a glob that the names match, without the suffix.
    """
    found = folder.glob(f"{name}.tar") if folder.is_dir() else ()
    return sorted((path for path in found if not path.name.startswith(".")), key=os.fsencode)


def read_manifest(root: Path) -> ShardManifest | None:
    """`dataset.json` of a data folder; None where there is none."""
    path = root / MANIFEST
    if not path.is_file():
        return None
    manifest = _load(path, ShardManifest)
    if manifest.format != FORMAT:
        raise UserError(f"{printable(path)} has format {manifest.format}; this version reads {FORMAT}")
    return manifest


def index_path(shard: Path) -> Path:
    """The path of a shard's index."""
    return shard.with_suffix(".json")


def load_index(path: Path) -> ShardIndex:
    """Read an index by itself, wherever its shard is.

    Raises:
        CorruptFileError: missing, or not what was written by its own hash.
    """
    return _load(path, ShardIndex)


def read_index(shard: Path, plan: str) -> ShardIndex:
    """Read the index beside a shard, and compare it with the shard's size.

    Raises:
        CorruptFileError: missing, damaged, of another plan, or not of this shard.
    """
    path = index_path(shard)
    index = load_index(path)
    with raising(CorruptFileError, f"cannot read shard {printable(shard)}"):
        size_bytes = shard.stat().st_size
    if index.format != FORMAT or index.plan != plan:
        raise CorruptFileError(f"{printable(path)} is of another set of shards: write the shards again")
    if index.size_bytes != size_bytes:
        raise CorruptFileError(
            f"shard {printable(shard)} has {size_bytes} bytes and its index says {index.size_bytes}: "
            "it is truncated or was changed; copy or write it again"
        )
    return index


def encode_index(value: ShardManifest | ShardIndex | dict[str, Any]) -> bytes:
    """The text of a manifest or an index, sealed by a hash of it, so that a changed label is noticed.

    The hash is of the text as it is, since an index of a million samples is read at each start.
    """
    text = json.dumps(msgspec.to_builtins(value), separators=(",", ":")).encode("ascii")[:-1]
    return text + _SEAL + hashlib.sha256(text).hexdigest().encode() + b'"}\n'


def _load(path: Path, kind: type[T]) -> T:
    """Read a JSON file. By Python's parser, since names that are not UTF-8 are lone surrogates in JSON."""
    with raising(CorruptFileError, f"cannot read {printable(path)}"):
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise CorruptFileError(f"{printable(path)} is too large to be an index")
        text = path.read_bytes()
    try:
        content = json.loads(text)
        found = msgspec.convert(content, type=kind)
        sealed, _, seal = text.rpartition(_SEAL)
        ours = content.get("format") == FORMAT  # another format is refused as such
        if ours and seal != hashlib.sha256(sealed).hexdigest().encode() + b'"}\n':
            raise CorruptFileError(
                f"{printable(path)} is not what was written, by its own hash: write the shards again"
            )
        return found
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise CorruptFileError(f"{printable(path)} is damaged: {error}; write the shards again") from error


def why_no_tar(shard: Path, error: Exception, where: str = "") -> str:
    """Why a shard cannot be read as a tar file: it is compressed under the name of a tar, or is damaged."""
    if read_head(shard).startswith(_COMPRESSED_MAGIC):
        return f"compressed: {UNPACK}"
    return f"no whole tar file{where}: {error}"


def takes_member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bool | None:
    """Whether a tar's member is taken for an image, as a file in a folder is.

    Returns:
        None for what is no image and is not missed: folders, hidden files, and the labels and descriptions
        that belong to WebDataset's samples.
    """
    name = member.name.rpartition("/")[2]
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - half the cost
    if member.isdir() or name.startswith(".") or suffix in _COMPANIONS:
        return None
    if suffix or not member.isreg():
        return suffix in IMAGE_SUFFIXES
    content = tar.extractfile(member)
    return content is not None and is_image_head(content.read(HEAD_BYTES))


def walk_tar(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of an open tar file, in little memory, and check that its end is there.

    Python's reader accepts a file that ends between two members, or within a header.

    Args:
        tar: opened with mode "r:" or "r:*", not read yet.
    Raises:
        tarfile.TarError: it is damaged, or its end is missing.
    """
    for member in tar:
        tar.members.clear()  # type: ignore[attr-defined]  # else all that passed would be kept
        yield member
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(BLOCK) != bytes(BLOCK):
        raise tarfile.ReadError("its end is missing")
