"""The exclude list: files that cannot be decoded, with their reasons, which training leaves out.

`quarantine.jsonl` in the data folder holds a line for each: `{"path": "train/dog/7.jpg", "reason": "..."}`.
Paths are relative to the data folder; a member of a tar shard is `train/shard-000000.tar/00000007.jpg`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from data_pipeline.common.errors import SaveError, UserError, raising
from data_pipeline.common.files import write_atomic
from data_pipeline.common.text import composed, printable, without_mark
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.kept_files import user_place

log = logging.getLogger("data_pipeline")

QUARANTINE = "quarantine.jsonl"
MAX_LIST_BYTES = 1 << 30
MAX_LINE_BYTES = 1 << 20


class _Row(msgspec.Struct, frozen=True):
    path: str
    reason: str


def find_exclude_list(root: Path, quarantine: Path | bool, *, missing_ok: bool = False) -> Path | None:
    """Find the list to apply; see `data_pipeline.datasets.open.open_dataset`.

    Of the list in the data folder and that in the user's cache, which `alexnet data verify` writes where the
    folder is read-only, it is the newer.

    Args:
        root: the data folder.
        quarantine: as `open_dataset`.
        missing_ok: whether a list that is named may be missing.
    Raises:
        UserError: a list was named and is not there, or its name is not that of a regular file.
    """
    if quarantine is False:
        return None
    path = root / QUARANTINE if quarantine is True else quarantine
    if not path.is_file() and (path.exists() or path.is_symlink()):
        raise UserError(f"the quarantine list {printable(path)} is not a regular file: remove it")
    places = [path] if quarantine is not True else [path, user_place(root, QUARANTINE)]
    found = [place for place in places if place is not None and place.is_file()]
    if not found and quarantine is not True and not missing_ok:
        raise UserError(f"no quarantine list {printable(path)}")
    return max(found, key=lambda place: place.stat().st_mtime_ns, default=None)


def save_exclude_list(root: Path, reasons: Mapping[str, str]) -> tuple[Path | None, str]:
    """Keep the list of a data folder: in it or, if it cannot be written to, in the user's cache.

    A list without entries is removed; one that cannot be is outdone by a newer, empty one.

    Returns:
        Where it is, None if none is needed; and, if that is not in the data folder, why.
    Raises:
        SaveError: it cannot be written anywhere.
    """
    own, other = root / QUARANTINE, user_place(root, QUARANTINE)
    try:
        if reasons:
            write_exclude_list(own, reasons)
        else:
            with raising(SaveError, f"{printable(own)} could not be removed"):
                own.unlink(missing_ok=True)
        if other is not None:
            other.unlink(missing_ok=True)
        return (own if reasons else None), ""
    except (SaveError, OSError) as error:
        reason = str(error)
        if other is None:
            raise SaveError(reason) from error
    try:
        other.parent.mkdir(parents=True, exist_ok=True)
        write_exclude_list(other, reasons)
    except (SaveError, OSError) as error:
        raise SaveError(f"{reason}; nor in the user's cache: {error}") from error
    return (other if reasons else None), reason


def read_exclude_list(path: Path) -> dict[str, str]:
    """Read the reason for each path in a list. The paths are compared with the data's own, and never opened.

    Raises:
        UserError: not such a list; the message names the line.
    """
    reasons: dict[str, str] = {}
    with raising(UserError, f"cannot read the quarantine list {printable(path)}"), path.open("rb") as file:
        if (size_bytes := path.stat().st_size) > MAX_LIST_BYTES:
            raise UserError(
                f"{printable(path)} has {size_bytes} bytes, which no quarantine list has "
                f"(limit {MAX_LIST_BYTES}): remove it, and write it again with alexnet data verify"
            )
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            if number == 1:
                line = without_mark(line, path)
            if line.strip():
                row = _parse(line, f"{printable(path)} line {number}")
                reasons[row.path] = row.reason
    return reasons


def _parse(line: bytes, where: str) -> _Row:
    if len(line) == MAX_LINE_BYTES:
        raise UserError(f"{where} is too long for a path and a reason: mend or remove the list")
    try:
        row = msgspec.convert(json.loads(line), _Row)  # msgspec's own parser refuses lone surrogates
        os.fsencode(row.path)  # a surrogate that stands for no byte is no file's name
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise UserError(
            f'{where} is not {{"path": ..., "reason": ...}}, two texts: mend or remove the list'
        ) from error
    return row


def write_exclude_list(path: Path, reasons: Mapping[str, str]) -> None:
    """Write a list, in the order given, whole or not at all. Names need not be UTF-8: JSON escapes them.

    Raises:
        SaveError: the folder cannot be written to.
    """
    rows = [json.dumps({"path": name, "reason": reason}) + "\n" for name, reason in reasons.items()]
    with raising(SaveError, f"the quarantine list {printable(path)} could not be written"):
        write_atomic(path, "".join(rows).encode("ascii"))


def names_of(dataset: Dataset) -> Iterator[str]:
    """Each sample's path relative to the data folder, as a list has it."""
    if dataset.reader is None:
        return (f"{dataset.folder}/{path}" for path in dataset.paths)
    return (dataset.name_at(i) for i in range(len(dataset)))


def exclude_listed(dataset: Dataset, path: Path) -> Dataset:
    """Exclude the samples that a list names; log how many, and how many entries name no sample.

    Raises:
        UserError: no sample would be left.
    """
    listed = {composed(name) for name in read_exclude_list(path)}
    names = map(composed, names_of(dataset))
    kept = np.fromiter((name not in listed for name in names), dtype=bool, count=len(dataset))
    num_excluded = len(dataset) - int(kept.sum())
    num_unknown = sum(1 for name in listed if name.startswith(f"{dataset.folder}/")) - num_excluded
    if num_unknown > 0:
        log.warning(
            "%d entries of %s name no image of %s: alexnet data verify renews the list",
            num_unknown, printable(path), dataset.split,
        )  # fmt: skip
    if not num_excluded:
        return dataset
    if not kept.any():
        raise UserError(f"{printable(path)} names every image of {dataset.split}: nothing would be left")
    elsewhere = "" if path == dataset.root / QUARANTINE else f", by the list {printable(path)}"
    log.info(
        "%s: %d of %d images in quarantine left out%s", dataset.split, num_excluded, len(dataset), elsewhere
    )
    return replace(dataset.take(np.flatnonzero(kept)), num_quarantined=num_excluded)
