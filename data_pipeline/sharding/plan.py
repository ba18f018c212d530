"""Plans the shards: which samples go into each, and in what form. All of it follows from the input alone."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_pipeline.common.errors import CorruptFileError, ImageError, UserError
from data_pipeline.common.files import MAX_FILE_BYTES, read_head
from data_pipeline.common.image_kind import Kind, kind_of
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.shards.shard_format import BLOCK, FORMAT, MANIFEST, index_path, read_manifest, shard_files
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.sampler import permutation_at

Int = npt.NDArray[np.int64]

_ESTIMATE_FROM = 64  # images; the estimate decides only how large a resized shard becomes
_EXTENSIONS = dict.fromkeys((".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp", ".mpo"), "jpg") | {
    ".tif": "tiff", ".apng": "png", ".avifs": "avif",
}  # fmt: skip
"""Extensions that readers of WebDataset know, for suffixes that are not such themselves."""
_OF_KIND = {Kind.UNREADABLE: "jpg", Kind.JPEG: "jpg", Kind.PNM: "ppm", Kind.JPEG2000: "jp2"}
"""Those of files without a suffix, where it is not the kind's name."""


def content_of(dataset: Dataset, number: int, resize_px: int | None, quality: int) -> tuple[bytes, str, bool]:
    """Make one sample's content for its shard.

    Returns:
        The bytes, the extension, and whether the image was to be resized and was not.
    Raises:
        UserError: the file cannot be read.
    """
    suffix = Path(dataset.paths[number]).suffix.lower()
    extension = _EXTENSIONS.get(suffix, suffix.lstrip("."))
    path = dataset.path_at(number)
    try:
        data = dataset.read(number)
    except ImageError as error:
        if path.is_file() and path.stat().st_size == 0:  # stays a sample, so that the order stays the same
            return b"", extension or "jpg", resize_px is not None
        raise UserError(f"{printable(path)} {error}: restore it, or remove it") from error
    if not extension:
        kind = kind_of(data)  # of a file that was damaged since it was listed, any
        extension = _OF_KIND.get(kind, kind.name.lower())
    if resize_px is None:
        return data, extension, False
    smaller = resized(data, resize_px, quality)
    return (data, extension, True) if smaller is None else (smaller, "jpg", False)


def resized(data: bytes, resize_px: int, quality: int) -> bytes | None:
    """Shorten the short side, as JPEG; None for an image that is short enough, or cannot be decoded."""
    from PIL import Image

    from data_pipeline.decode.header import read_header
    from data_pipeline.decode.pillow import decode_rgb

    try:
        height, width = read_header(data, Preprocessing().max_pixels)
        if min(height, width) <= resize_px:
            return None
        image = decode_rgb(data)
    except ImageError:
        return None
    ratio = resize_px / min(image.size)
    size = (max(1, round(image.width * ratio)), max(1, round(image.height * ratio)))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def member_bytes(name: str, data: bytes) -> bytes:
    """Make one tar member: a header without owner and time, and the content filled up to whole blocks."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


def sizes_of(dataset: Dataset) -> Int:
    """Get the size of every file, in bytes.

    Raises:
        UserError: one that is missing, or too large to be an image.
    """
    sizes = np.zeros(len(dataset), dtype=np.int64)
    for i in range(len(dataset)):
        path = f"{dataset.root}/{dataset.folder}/{dataset.paths[i]}"
        try:
            sizes[i] = os.stat(path).st_size  # noqa: PTH116 - half the cost of Path.stat
        except OSError as error:
            raise UserError(
                f"{printable(path)} cannot be read: {error.strerror}; restore it, or remove it"
            ) from error
    if len(dataset) and sizes.max() > MAX_FILE_BYTES:
        big = int(sizes.argmax())
        raise UserError(f"{printable(dataset.path_at(big))} has {sizes[big]} bytes: no image is that large")
    return sizes


def resized_share(dataset: Dataset, resize_px: int, quality: int) -> float:
    """Estimate the fraction of its bytes that an image keeps, from a fixed few images."""
    before = after = 0
    for i in np.linspace(0, len(dataset) - 1, min(len(dataset), _ESTIMATE_FROM)).astype(int).tolist():
        try:
            data = dataset.read(i)
        except ImageError:
            continue
        before, after = before + len(data), after + len(resized(data, resize_px, quality) or data)
    return after / before if before else 1.0


def deal_samples(sizes: Int, shard_bytes: int) -> list[Int]:
    """Deal samples to shards: a fixed random order, cut where a shard is full."""
    order = permutation_at(0, 0, len(sizes))
    taken = np.cumsum(2 * BLOCK + BLOCK + -(-sizes[order] // BLOCK) * BLOCK)
    deals, first, room = [], 0, shard_bytes - 2 * BLOCK
    while first < len(order):
        before = int(taken[first - 1]) if first else 0
        end = max(first + 1, int(np.searchsorted(taken, before + room, side="right")))
        deals.append(order[first:end])
        first = end
    return deals


def plan_hash(
    datasets: list[Dataset], sizes: list[Int], shard_bytes: int, resize_px: int | None, quality: int
) -> str:
    """Hash what a set of shards is made from: names, labels, sizes and settings, but no times."""
    settings = [FORMAT, shard_bytes, resize_px, None if resize_px is None else quality]
    digest = hashlib.sha256(json.dumps([settings, *datasets[0].classes]).encode())
    for dataset, own in zip(datasets, sizes, strict=True):
        digest.update(json.dumps([dataset.split, len(dataset)]).encode())
        for name in dataset.paths:
            digest.update(os.fsencode(name) + b"\0")
        digest.update(dataset.labels.astype("<i8").tobytes() + own.astype("<i8").tobytes())
    return digest.hexdigest()


def check_folder(out: Path, splits: tuple[str, ...], planned: Mapping[Path, int], plan: str) -> None:
    """Refuse a folder that holds shards of other data or settings: nothing there is replaced.

    Args:
        out: the folder.
        splits: those to be written.
        planned: the shards to be written, and the number of the first sample of each.
        plan: hash of what they are made from.
    Raises:
        UserError: a shard, index or manifest that this plan did not write.
    """
    try:
        read_manifest(out)
    except CorruptFileError as error:
        raise UserError(
            f"{printable(out / MANIFEST)} is there, and no manifest of shards: give a new folder"
        ) from error
    found = (shard_files(out / split) or shard_files(out, f"*{split}*") for split in splits)
    for shard in chain.from_iterable(found):
        known = _plan_of(shard)
        ours = known == plan or (known is None and shard in planned and _begins(shard, planned[shard]))
        if shard not in planned or not ours:
            raise UserError(
                f"{printable(out)} holds shards of other data or settings ({printable(shard.name)}): "
                "give a new folder, or the same source and settings"
            )


def _begins(shard: Path, number: int) -> bool:
    """Whether a tar without a sound index begins with the sample with which we would begin it, or is empty.

    A run that was killed between a shard and its index leaves such a one. Other people's tars have owners and
    times.
    """
    head = read_head(shard, BLOCK)
    if not head:
        return True
    try:
        member = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return member.name.startswith(f"{number:08d}.") and (member.mtime, member.uid, member.uname) == (0, 0, "")


def _plan_of(shard: Path) -> object:
    """The plan of a shard's index; None where there is none, or it is damaged: the shard is written again."""
    try:
        return json.loads(index_path(shard).read_bytes())["plan"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
