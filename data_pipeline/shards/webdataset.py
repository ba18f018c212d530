"""Indexes tar shards from elsewhere: samples from the tar headers, classes from the `.cls` members."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import IMAGE_SUFFIXES
from data_pipeline.common.passed_over import PassedOver
from data_pipeline.common.text import names_in, printable
from data_pipeline.shards.shard_format import ShardIndex, make_index, takes_member, walk_tar, why_no_tar

CLASSES = "classes.txt"
"""Names of the classes, one a line, in the order of their numbers; without it the numbers are the names."""

_MAX_LABEL_BYTES = 64


def index_foreign(
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
