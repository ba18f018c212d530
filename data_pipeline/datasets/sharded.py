"""Tar shards in the WebDataset layout, read sample by sample.

`train/shard-000000.tar` holds pairs `00000123.jpg` and `00000123.cls`, the class as a number. Beside it
stands `shard-000000.json`, an index of where each sample is, so that any order reaches it with one read.
The number in a member's name is the sample's place in the dataset: by class and then by name, as in
the folders that the shards were made from. `dataset.json` names the classes and every shard.

An index is not trusted: each entry must lie inside its shard, and each read compares the tar header before
the image with the index. Shards from elsewhere, without `dataset.json` and indices, are listed by their
headers.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import IMAGE_SUFFIXES
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.common.passed_over import PassedOver
from data_pipeline.common.text import names_in, printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.sample_table import SampleTable
from data_pipeline.shards.mapped_shards import ShardFiles
from data_pipeline.shards.shard_format import (
    BLOCK,
    MANIFEST,
    ShardIndex,
    index_path,
    make_index,
    read_index,
    read_manifest,
    takes_member,
    walk_tar,
    why_no_tar,
)
from data_pipeline.shards.shard_reader import ShardReader

Int = npt.NDArray[np.int64]

CLASSES = "classes.txt"
"""Names of the classes, one a line, in the order of their numbers; without it the numbers are the names."""

_MAX_LABEL_BYTES = 64


def open_shards(root: Path, split: str, shards: list[Path]) -> Dataset:
    """Open a split that is stored in tar shards.

    Args:
        root: the data folder.
        split: the split's name.
        shards: its tar files, as `shard_files` finds them.
    Raises:
        CorruptFileError: a shard or an index that is damaged, missing, or does not fit the other.
        UserError: shards without class labels.
    """
    manifest = read_manifest(root)
    indices: Iterable[ShardIndex]
    passed_over = PassedOver()
    if manifest is None:
        indices, classes, passed_over = _index_foreign(root, split, shards)
        labels_text: tuple[str, ...] = ()
    else:
        expected = {entry.name for entry in manifest.splits.get(split, [])}
        differing = sorted(expected ^ {path.name for path in shards})
        if differing:
            raise CorruptFileError(
                f"{printable(root / MANIFEST)} and the shards of {split} differ, "
                f"first in {printable(differing[0])}: the data is incomplete, or a shard was added; "
                "write the shards again"
            )
        # one after the other: the lists of a million samples would need ten times the memory of the arrays
        indices = (read_index(path, manifest.plan) for path in shards)
        classes, labels_text = tuple(manifest.classes), tuple(manifest.labels_text)

    ours = manifest is not None
    parts = [_columns(shard, index, len(classes), ours) for shard, index in zip(shards, indices, strict=True)]
    numbers, offsets, sizes, labels = np.concatenate([part.numbers for part in parts], axis=1)
    if not np.array_equal(np.sort(numbers), np.arange(len(numbers))):
        raise CorruptFileError(
            f"the indices of {printable(root)}/{split} do not number each sample once: write the shards again"
        )
    if not len(numbers):
        raise UserError(f"the shards of {printable(root)}/{split} hold no samples")
    order = np.argsort(numbers, kind="stable")
    shard_of = np.repeat(np.arange(len(shards)), [part.numbers.shape[1] for part in parts])
    reader = ShardReader(
        shards=tuple(os.path.relpath(shard, root) for shard in shards),
        files=ShardFiles(tuple(shards)),
        shard_of=shard_of,
        offsets=offsets,
        sizes=sizes,
        members=PackedStrings.join([part.members for part in parts]),
    )
    paths = PackedStrings.join([part.names for part in parts])
    tables = [part.table for part in parts if part.table is not None]
    table = SampleTable.join(tables) if ours else None
    return Dataset(
        root, split, paths, labels, classes, labels_text, reader=reader, table=table, passed_over=passed_over
    ).take(order)


class _Columns(NamedTuple):
    """One index as arrays.

    Attributes:
        numbers: (4, N) numbers, offsets, sizes and labels.
        names: the original ones.
        members: names in the tar.
        table: what a look at the images found; None for shards from elsewhere.
    """

    numbers: Int
    names: PackedStrings
    members: PackedStrings
    table: SampleTable | None


def _columns(shard: Path, index: ShardIndex, num_classes: int, ours: bool) -> _Columns:
    """Check that every entry of an index lies inside the shard and the classes, and is a possible look."""
    looks = [index.kinds, index.heights, index.widths, index.orientations, index.direct]
    try:
        numbers = _numbers(index, num_classes)
        table = SampleTable.from_columns(index.sizes, *looks) if ours else None
    except (ValueError, OverflowError) as error:
        raise CorruptFileError(
            f"{printable(index_path(shard))} is damaged: {error}; write the shards again"
        ) from error
    return _Columns(numbers, PackedStrings.pack(index.names), PackedStrings.pack(index.members), table)


def _numbers(index: ShardIndex, num_classes: int) -> Int:
    """(4, N) numbers, offsets, sizes and labels, if each entry lies inside the shard and the classes."""
    columns = [index.numbers, index.offsets, index.sizes, index.labels]
    if {len(index.names), len(index.members), *map(len, columns)} == {len(index.numbers)}:
        numbers = np.array(columns, dtype=np.int64)
        _, offsets, sizes, labels = numbers
        # compared without adding, which could overflow
        begins = (offsets >= BLOCK) & (offsets <= index.size_bytes)
        ends = (sizes >= 0) & (sizes <= index.size_bytes - offsets)
        if (begins & ends & (labels >= 0) & (labels < num_classes)).all():
            return numbers
    raise ValueError("an entry lies outside the shard or the classes")


def _index_foreign(
    root: Path, split: str, shards: list[Path]
) -> tuple[list[ShardIndex], tuple[str, ...], PassedOver]:
    """Make the indices of shards that have none.

    Samples come in the order of the shards' names and of the members in them.

    Returns:
        An index for each shard, the names of the classes, and what was passed over.
    Raises:
        UserError: an image without a class, a class that is no number, or one that `classes.txt` lacks.
        CorruptFileError: a shard that is no whole tar file.
    """
    indices: list[ShardIndex] = []
    passed_over = PassedOver()
    for shard in shards:
        first = sum(len(index.numbers) for index in indices)
        indices.append(_index_shard(shard, first, passed_over))
    highest = max((max(index.labels, default=-1) for index in indices), default=-1)
    path = root / CLASSES
    if path.is_file():
        classes = names_in(path.read_bytes(), path)
    else:
        classes = tuple(str(number) for number in range(highest + 1))
    if highest >= len(classes):
        raise UserError(
            f"the shards of {printable(root)}/{split} have a class {highest} and {CLASSES} names "
            f"{len(classes)} classes: count from 0, and name every class"
        )
    if len(classes) < 2:
        raise UserError(f"the shards of {printable(root)}/{split} hold fewer than two classes")
    return indices, classes, passed_over


def _index_shard(shard: Path, first: int, passed_over: PassedOver) -> ShardIndex:
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in walk_tar(tar):
                folder, _, name = member.name.rpartition("/")
                key, _, extension = name.partition(".")
                key = f"{folder}/{key}"
                if not member.isreg():
                    continue
                taken = takes_member(tar, member)
                if f".{extension.lower()}" in IMAGE_SUFFIXES or (taken and not extension):
                    images[key] = (member.name, member.offset_data, member.size)
                elif extension == "cls":
                    labels[key] = _label(tar, member, shard)
                elif taken is False:
                    passed_over.add(member.name)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise CorruptFileError(f"shard {printable(shard)} is {why_no_tar(shard, error)}") from error
    without = next((name for key, (name, _, _) in images.items() if key not in labels), None)
    if without is not None:
        raise UserError(
            f"{printable(without)} in shard {printable(shard)} has no class: expected a member with the same "
            "name and the suffix .cls that holds its number"
        )
    rows = (
        (number, f"{shard.name}/{name}", name, offset, size, labels[key])
        for number, (key, (name, offset, size)) in enumerate(images.items(), first)
    )
    return make_index(rows, size_bytes=shard.stat().st_size)


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    file = tar.extractfile(member) if member.size <= _MAX_LABEL_BYTES else None
    text = file.read().strip() if file is not None else b""
    if not text.isdigit() or len(text) > 9:
        raise UserError(
            f"{printable(member.name)} in shard {printable(shard)} is no class number, "
            f"but {os.fsdecode(text)[:20]!r}"
        )
    return int(text)
