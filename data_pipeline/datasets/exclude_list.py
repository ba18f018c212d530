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

from data_pipeline.common.errors import SaveError, UserError
from data_pipeline.common.files import write_atomic
from data_pipeline.common.text import printable, without_mark
from data_pipeline.datasets.dataset import Dataset

log = logging.getLogger("data_pipeline")

QUARANTINE = "quarantine.jsonl"
MAX_LIST_BYTES = 1 << 30
MAX_LINE_BYTES = 1 << 20


class _Row(msgspec.Struct, frozen=True):
    path: str
    reason: str


def find_exclude_list(root: Path, quarantine: Path | bool) -> Path | None:
    """Find the list to apply; see `data_pipeline.datasets.open.open_dataset`.

    Raises:
        UserError: a list was named and is not there, or its name is not that of a regular file.
    """
    if quarantine is False:
        return None
    path = root / QUARANTINE if quarantine is True else quarantine
    if path.is_file():
        return path
    if path.exists() or path.is_symlink():
        raise UserError(f"the quarantine list {printable(path)} is not a regular file: remove it")
    if quarantine is True:
        return None
    raise UserError(f"no quarantine list {printable(path)}")


def read_exclude_list(path: Path) -> dict[str, str]:
    """Read the reason for each path in a list. The paths are compared with the data's own, and never opened.

    Raises:
        UserError: not such a list; the message names the line.
    """
    reasons: dict[str, str] = {}
    try:
        with path.open("rb") as file:
            if (size_bytes := path.stat().st_size) > MAX_LIST_BYTES:
                raise UserError(
                    f"{printable(path)} has {size_bytes} bytes, which no quarantine list has "
                    f"(limit {MAX_LIST_BYTES}): remove it, and write it again with alexnet data verify"
                )
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
                if number == 1:
                    line = without_mark(line, path)
                if line.strip():
                    name, reason = _parse(line, f"{printable(path)} line {number}")
                    reasons[name] = reason
    except OSError as error:
        raise UserError(
            f"cannot read the quarantine list {printable(path)}: {error.strerror or error}"
        ) from error
    return reasons


def _parse(line: bytes, where: str) -> tuple[str, str]:
    if len(line) == MAX_LINE_BYTES:
        raise UserError(f"{where} is too long for a path and a reason: mend or remove the list")
    try:
        row = msgspec.convert(json.loads(line), _Row)  # msgspec's own parser refuses lone surrogates
        os.fsencode(row.path)  # a surrogate that stands for no byte is no file's name
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise UserError(
            f'{where} is not {{"path": ..., "reason": ...}}, two texts: mend or remove the list'
        ) from error
    return row.path, row.reason


def write_exclude_list(path: Path, reasons: Mapping[str, str]) -> None:
    """Write a list, in the order given, whole or not at all. Names need not be UTF-8: JSON escapes them.

    Raises:
        SaveError: the folder cannot be written to.
    """
    rows = [json.dumps({"path": name, "reason": reason}) + "\n" for name, reason in reasons.items()]
    try:
        write_atomic(path, "".join(rows).encode("ascii"))
    except OSError as error:
        raise SaveError(
            f"the quarantine list {printable(path)} could not be written: {error.strerror or error}"
        ) from error


def names_of(dataset: Dataset) -> Iterator[str]:
    """Each sample's path relative to the data folder, as a list has it."""
    if dataset.reader is None:
        return (f"{dataset.split}/{path}" for path in dataset.paths)
    return (dataset.name_at(i) for i in range(len(dataset)))


def exclude_listed(dataset: Dataset, path: Path) -> Dataset:
    """Exclude the samples that a list names; log how many, and how many entries name no sample.

    Raises:
        UserError: no sample would be left.
    """
    listed = read_exclude_list(path)
    kept = np.fromiter((name not in listed for name in names_of(dataset)), dtype=bool, count=len(dataset))
    num_excluded = len(dataset) - int(kept.sum())
    num_unknown = sum(1 for name in listed if name.startswith(f"{dataset.split}/")) - num_excluded
    if num_unknown > 0:
        log.warning(
            "%d entries of %s name no image of %s: alexnet data verify renews the list",
            num_unknown, printable(path), dataset.split,
        )  # fmt: skip
    if not num_excluded:
        return dataset
    if not kept.any():
        raise UserError(f"{printable(path)} names every image of {dataset.split}: nothing would be left")
    log.info("%s: %d of %d images in quarantine left out", dataset.split, num_excluded, len(dataset))
    return replace(dataset.take(np.flatnonzero(kept)), num_quarantined=num_excluded)
