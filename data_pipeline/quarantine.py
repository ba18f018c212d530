"""The quarantine list: files that cannot be decoded, with their reasons, which training leaves out.

`quarantine.jsonl` in the data folder holds a line for each: `{"path": "train/dog/7.jpg", "reason": "..."}`.
Paths are relative to the data folder; a member of a tar shard is `train/shard-000000.tar/00000007.jpg`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.faults import printable
from data_pipeline.files import write_atomic
from data_pipeline.index import Dataset

log = logging.getLogger("data_pipeline")

QUARANTINE = "quarantine.jsonl"


def find_quarantine(root: Path, quarantine: Path | bool | None) -> Path | None:
    """The list to honour; see `data_pipeline.layouts.open_dataset`.

    Raises:
        UserError: a list was named and is not there.
    """
    if quarantine is False or quarantine is None:
        return None
    path = root / QUARANTINE if quarantine is True else quarantine
    if path.is_file():
        return path
    if quarantine is True:
        return None
    raise UserError(f"no quarantine list {printable(path)}")


def read_quarantine(path: Path) -> dict[str, str]:
    """The reason for each path in a list.

    Raises:
        UserError: not such a list; says which line.
    """
    reasons: dict[str, str] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the quarantine list {printable(path)}: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, reason = row["path"], row["reason"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f'{printable(path)} line {number} is not {{"path": ..., "reason": ...}}: '
                "mend or remove the list"
            ) from error
        if not isinstance(name, str) or not isinstance(reason, str):
            raise UserError(f"{printable(path)} line {number}: path and reason must be texts")
        reasons[name] = reason
    return reasons


def write_quarantine(path: Path, reasons: Mapping[str, str]) -> None:
    """Write a list, in the order given, whole or not at all. Names need not be UTF-8: JSON escapes them."""
    rows = [json.dumps({"path": name, "reason": reason}) + "\n" for name, reason in reasons.items()]
    write_atomic(path, "".join(rows).encode("ascii"))


def leave_out(dataset: Dataset, path: Path) -> Dataset:
    """The dataset without the samples that a list names; says how many.

    Raises:
        UserError: nothing would be left.
    """
    listed = read_quarantine(path)
    mine = {name for name in listed if name.startswith(f"{dataset.split}/")}
    if not mine:
        return dataset
    kept = np.array(
        [i for i in range(len(dataset)) if dataset.name_at(i) not in mine],
        dtype=np.int64,
    )
    num_left_out = len(dataset) - len(kept)
    if not len(kept):
        raise UserError(f"{printable(path)} names every image of {dataset.split}: nothing would be left")
    if num_left_out:
        log.info("%s: %d of %d images in quarantine left out", dataset.split, num_left_out, len(dataset))
    return replace(dataset.take(kept), num_quarantined=num_left_out) if num_left_out else dataset
