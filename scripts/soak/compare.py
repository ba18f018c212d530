"""Comparison of two finished runs: the last state and the metrics rows, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch

from train.checkpoints.format import STATE
from train.checkpoints.load import find_checkpoint, verify_checkpoint
from train.checkpoints.safe_load import load_plain


def compare_runs(run: Path, undisturbed: Path) -> tuple[bool, bool]:
    """Whether two finished runs have the same last state and the same rows, bit for bit.

    The state is everything in the last checkpoint: weights, momentum, counters, position. Only the
    configuration differs, by the folders that it names, and the time that training took.
    """
    states = []
    for path in (run, undisturbed):
        folder = find_checkpoint(path, pointer="last")
        verify_checkpoint(folder)
        state = {k: v for k, v in load_plain(folder / STATE).items() if k != "config"}
        state["progress"].pop("seconds")
        states.append(state)
    return equal_trees(*states), read_rows(run) == read_rows(undisturbed)


def equal_trees(one: Any, other: Any) -> bool:
    """Whether two trees of plain values and tensors are equal, tensors bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal_trees(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal_trees(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, without the fields that depend on the clock."""
    rows = msgspec.json.Decoder().decode_lines((run / "metrics.jsonl").read_bytes())
    return [{k: v for k, v in row.items() if k not in ("time", "images_per_s")} for row in rows]
