"""Finds the folder of a split: `val`, `valid` and `validation`, in any case, are all the validation split."""

from __future__ import annotations

import os
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable
from data_pipeline.datasets.image_folder import LAYOUT, is_folder, list_entries
from data_pipeline.shards.shard_format import COMPRESSED_SUFFIXES, UNPACK, shard_files

SPLITS = ("train", "val", "test")
FOLDERS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
"""The names of a split's folder, in lower case; the first is also the name of the split."""


def split_named(name: str) -> str:
    """The split that a folder's name stands for.

    >>> split_named("Validation"), split_named("train"), split_named("val2")
    ('val', 'train', 'val2')
    """
    return next((split for split, names in FOLDERS.items() if name.lower() in names), name)


def find_split_folder(root: Path, split: str) -> str | None:
    """The name of a split's folder in a data folder: the split's own name before any other; None if none is.

    Raises:
        UserError: several folders could be it.
    """
    if (root / split).is_dir():
        return split
    names = FOLDERS.get(split, ())
    found = [e.name for e in list_entries(root) if e.name.lower() in names and is_folder(e)]
    if len(found) > 1:
        raise UserError(
            f"{printable(root)} holds {' and '.join(map(printable, found))}, and each may be the {split} "
            f"split: name one of them {split!r}"
        )
    return found[0] if found else None


def shards_of(root: Path, split: str, folder: str | None) -> list[Path]:
    """The tar shards of a split: in its folder or, where it has none, or an empty one, in the data folder.

    A tar beside a folder that holds something is what that was unpacked from.
    """
    if folder is not None and (inside := shard_files(root / folder)):
        return inside
    return [] if folder is not None and list_entries(root / folder) else shard_files(root, f"*{split}*")


def refuse_compressed_shards(root: Path, split: str, folder: str | None) -> None:
    """Refuse a split some of whose shards are compressed: their samples could not be read at any place.

    Archives beside class folders are no shards.

    Raises:
        UserError: naming the first, and what to do.
    """
    where, name = (root, f"*{split}*") if folder is None else (root / folder, "*")
    if folder is not None and any(map(is_folder, list_entries(where))):
        return
    found = [path for suffix in COMPRESSED_SUFFIXES for path in where.glob(f"{name}{suffix}")]
    if found:
        others = f", and {len(found) - 1} more" if len(found) > 1 else ""
        raise UserError(f"compressed: {printable(min(found, key=os.fsencode))}{others}: {UNPACK}")


def no_split(root: Path, split: str) -> UserError:
    """The error for a split that is not there, with the names it may have and what may be meant for it."""
    names = FOLDERS.get(split, (split,))
    text = f"no folder {split!r} in {printable(root)}"
    if len(names) > 1:
        text += f" (nor {' or '.join(names[1:])})"
    if split == "val" and (test := find_split_folder(root, "test")) is not None:
        text += f"; {test!r} is not taken for it: name it 'val' if it is for validation"
    return UserError(f"{text}: {LAYOUT}")
