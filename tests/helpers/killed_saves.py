"""Saving, killed before each thing that it does to the disk: tests.helpers.killed_saves, in an empty folder.

For every call that changes the disk (open, write, fsync, rename, …) a process is forked that saves and gets
SIGKILL there. Then a run resumes from what is left. Prints as JSON, for each
case, which checkpoint that was after each kill.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from tests.helpers.checkpoint_samples import CONFIG, make_writer, row, small_snapshot
from train.checkpoints.format import Snapshot
from train.checkpoints.load import find_checkpoint, find_newest_intact, load_checkpoint, verify_checkpoint
from train.checkpoints.retention import restore_replaced, saved_steps
from train.runs.folder import RunFolder, create_run
from train.runs.resume import rewind

CHANGES = {
    "open", "write", "flush", "truncate", "close", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"
}  # fmt: skip
"""System calls that change the disk."""


def is_of_the_system(called: Any) -> bool:
    """Return whether a function is one of the operating system's, or a file's own."""
    return called.__module__ in ("posix", "io", "_io") or isinstance(called.__self__, io.IOBase)


def kill_before_call(number: int) -> None:
    """Send this process SIGKILL before its call `number`, counted from 0, that changes the disk."""
    left = number

    def count(frame: FrameType, event: str, called: Any) -> None:
        nonlocal left
        if event == "c_call" and called.__name__ in CHANGES and is_of_the_system(called):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def value_and_step(folder: Path) -> tuple[float, int]:
    """Return the number that fills the weights of an intact checkpoint, and its step."""
    checkpoint = load_checkpoint(folder)
    (value,) = torch.unique(checkpoint.model_state["weight"]).tolist()
    return float(value), checkpoint.step


def check_next_start(folder: RunFolder) -> float:
    """Resume as a run does, and save once more. Returns the number in the checkpoint resumed from."""
    restore_replaced(folder.checkpoints)
    newest = find_newest_intact(folder.path)
    found, step = value_and_step(newest)
    best = rewind(folder, step)
    assert best is not None and find_checkpoint(folder.path) in saved_steps(folder.checkpoints).values()
    assert [r.step for r in folder.rows()] == list(range(1, step + 1))
    writer = make_writer(folder, best)
    writer._write(small_snapshot(9, value=9.0))
    assert writer.failure is None and value_and_step(folder.checkpoints / "step-00000009") == (9.0, 9)
    assert not [p for p in folder.checkpoints.iterdir() if p.name.startswith(".")]
    for kept in saved_steps(folder.checkpoints).values():
        verify_checkpoint(kept)
    return found


def sweep(name: str, before: list[Snapshot], last: Snapshot) -> list[float]:
    """Kill the saving of the last snapshot at every call, each time with the ones before on the disk."""
    found: list[float] = []
    status = signal.SIGKILL.value
    while status:
        assert status == signal.SIGKILL, status
        folder = create_run(Path(name), CONFIG)
        writer = make_writer(folder)
        for state in before:
            folder.append(row(state.step))
            writer._write(state)
        child = os.fork()
        if child == 0:
            if last.step not in {state.step for state in before}:
                folder.append(row(last.step))
            kill_before_call(len(found))
            writer._write(last)
            sys.setprofile(None)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found.append(check_next_start(folder))
    return found


def main() -> None:
    """Run both cases."""
    states = [small_snapshot(step, value=float(step), top1=step / 10) for step in (1, 2)]
    again = dataclasses.replace(states[1], states=small_snapshot(2, value=2.5).states)
    found = {"next": sweep("next", states[:1], states[1]), "same": sweep("same", states, again)}
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
