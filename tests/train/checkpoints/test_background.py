"""Checkpoints written beside training: what is record_copies stays as it was, one at a time, and errors are told."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from train.checkpoints.background import AsyncCheckpointWriter, PinnedStaging, record_copies
from train.checkpoints.format import Pointer, read_pointer
from train.checkpoints.load import load_checkpoint
from train.checkpoints.retention import saved_steps
from train.checkpoints.write import Snapshot
from train.config.load import make_config
from train.runs.folder import create_run

CONFIG = make_config("demo", ["keep_checkpoints=1"])


def small_state(step: int, value: float = 1.0, top1: float | None = None) -> Snapshot:
    """A state that is written in no time."""
    return Snapshot(
        step=step,
        epoch=0,
        samples_seen=step * 64,
        config=CONFIG,
        classes=("a", "b"),
        metrics={} if top1 is None else {"top1": top1},
        parts={
            "model": {"weight": torch.full((3, 3), value)},
            "optimizer": {"state": {}, "param_groups": []},
        },
    )


def held_back(state: Snapshot) -> tuple[Snapshot, threading.Event]:
    """The same, and what lets it be written: until then it is in flight, as if the disk were slow."""
    event = threading.Event()

    def wait() -> None:
        assert event.wait(60)

    return dataclasses.replace(state, wait_until_copied=wait), event


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[AsyncCheckpointWriter]:
    with closing(AsyncCheckpointWriter(create_run(tmp_path, CONFIG), CONFIG, None)) as saver:
        yield saver


def test_nothing_points_to_a_checkpoint_or_is_removed_before_it_is_written(
    saver: AsyncCheckpointWriter,
) -> None:
    folder = saver.folder.checkpoints
    saver.start(small_state(1, top1=0.5))
    saver.wait()
    assert sorted(p.name for p in folder.iterdir()) == ["best.json", "last.json", "step-00000001"]
    state, go_on = held_back(small_state(2, top1=0.75))
    saver.start(state)
    assert sorted(p.name for p in folder.iterdir()) == ["best.json", "last.json", "step-00000001"]
    assert (
        read_pointer(folder / "best.json") == read_pointer(folder / "last.json") == Pointer(step=1, top1=0.5)
    )
    go_on.set()
    saver.wait()
    assert list(saved_steps(folder)) == [2]
    assert (
        read_pointer(folder / "best.json") == read_pointer(folder / "last.json") == Pointer(step=2, top1=0.75)
    )
    saver.start(small_state(3, top1=0.25))
    saver.wait()
    assert list(saved_steps(folder)) == [2, 3], "the best stays, whatever comes after it"
    assert (read_pointer(folder / "best.json").step, read_pointer(folder / "last.json").step) == (2, 3)
    assert (saver.num_saved, saver.unsaved) == (3, None)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_copied_stays_as_it_was_while_training_goes_on(
    saver: AsyncCheckpointWriter, device: str
) -> None:
    weight = torch.randn(4, 3, 11, 11, device=device).to(memory_format=torch.channels_last)
    moments: dict[str, Any] = {
        "state": {0: {"momentum_buffer": weight.clone()}},
        "param_groups": [{"lr": 0.5, "params": [0]}],
    }
    expected = weight.cpu().clone(memory_format=torch.preserve_format)
    for step in (1, 2):  # the second time, into the same memory
        parts = saver.copies.take({"model": {"weight": weight}, "optimizer": moments})
        wait = record_copies(weight.device)
        state, go_on = held_back(dataclasses.replace(small_state(step), parts=parts))
        saver.start(state)
        weight.add_(1)
        moments["param_groups"][0]["lr"] = 0.25
        wait()
        go_on.set()
        saver.wait()
        found = load_checkpoint(saver.folder.checkpoints / f"step-0000000{step}")
        assert torch.equal(found.model_state["weight"], expected)
        assert found.model_state["weight"].stride() == expected.stride()
        assert found.parts["optimizer"]["param_groups"][0]["lr"] == (0.5 if step == 1 else 0.25)
        expected += 1


def test_copies_use_the_same_memory_again_unless_the_shape_changed() -> None:
    copies = PinnedStaging()
    first = copies.take({"a": [torch.ones(3), 7], "b": {"a": torch.zeros(2)}})
    again = copies.take({"a": [torch.zeros(3), 8], "b": {"a": torch.zeros(2, 2)}})
    assert again["a"][0].data_ptr() == first["a"][0].data_ptr()
    assert again["a"][0].tolist() == [0, 0, 0]
    assert again["a"][1] == 8
    assert again["b"]["a"].shape == (2, 2)


def test_a_second_checkpoint_waits_for_the_first_and_says_so(
    saver: AsyncCheckpointWriter, caplog: pytest.LogCaptureFixture
) -> None:
    state, go_on = held_back(small_state(50))
    saver.start(state)
    timer = threading.Timer(0.2, go_on.set)
    timer.start()
    saver.wait("step 100")
    timer.join()
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "step 100 waits: the checkpoint of step 50 is still being written"
    assert said[1].startswith("training was held up for 0.")
    assert list(saved_steps(saver.folder.checkpoints)) == [50]
    saver.wait("step 100")
    assert len(caplog.records) == 2


def test_leaving_waits_for_the_checkpoint_in_flight(tmp_path: Path) -> None:
    folder = create_run(tmp_path, CONFIG)
    with closing(AsyncCheckpointWriter(folder, CONFIG, None)) as saver:
        state, go_on = held_back(small_state(7))
        saver.start(state)
        timer = threading.Timer(0.1, go_on.set)
        timer.start()
    timer.join()
    assert load_checkpoint(folder.checkpoints / "step-00000007").step == 7


def test_a_checkpoint_that_cannot_be_written_is_told_and_the_next_one_makes_up_for_it(
    saver: AsyncCheckpointWriter, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saver.folder.checkpoints
    saver.start(small_state(1, top1=0.5))
    saver.wait()
    folder.rename(folder.with_name("away"))
    folder.write_text("a file where the folder was")
    saver.start(small_state(2, top1=0.75))
    saver.wait()
    assert str(saver.unsaved).endswith("step-00000002 could not be written: File exists")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().endswith("; training goes on, and the checkpoints before it are untouched")
    assert saver.best == Pointer(step=1, top1=0.5), "what is not there cannot be the best"
    folder.unlink()
    folder.with_name("away").rename(folder)
    saver.start(small_state(3))
    saver.wait()
    assert (saver.unsaved, list(saved_steps(folder))) == (None, [1, 3])


def test_an_error_that_nobody_foresaw_reaches_the_training_thread(saver: AsyncCheckpointWriter) -> None:
    def fail() -> None:
        raise ArithmeticError("nobody foresaw this")

    saver.start(dataclasses.replace(small_state(1), wait_until_copied=fail))
    with pytest.raises(ArithmeticError, match="nobody foresaw this"):
        saver.wait()
    saver.wait()
