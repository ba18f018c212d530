"""Checkpoints written beside training: snapshots do not change, writes are serial, errors are logged."""

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

from tests.helpers.checkpoint_samples import CONFIG, make_writer, small_snapshot
from train.checkpoints.background import AsyncCheckpointWriter, PinnedStaging
from train.checkpoints.format import Pointer, read_pointer
from train.checkpoints.load import load_checkpoint
from train.checkpoints.retention import saved_steps
from train.runs.folder import create_run


def hold_back(writer: AsyncCheckpointWriter) -> threading.Event:
    """Keep the next checkpoint in flight, as on a slow disk, until the event is set."""
    event, before_write = threading.Event(), writer.before_write

    def wait() -> None:
        assert event.wait(60)
        before_write()

    writer.before_write = wait
    return event


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[AsyncCheckpointWriter]:
    with closing(make_writer(create_run(tmp_path, CONFIG))) as writer:
        yield writer


def test_pointers_and_removals_wait_for_the_checkpoint(
    writer: AsyncCheckpointWriter,
) -> None:
    folder = writer.folder
    writer.start(small_snapshot(1, top1=0.5))
    writer.wait()
    assert sorted(p.name for p in folder.iterdir()) == ["best.json", "last.json", "step-00000001"]
    go_on = hold_back(writer)
    writer.start(small_snapshot(2, top1=0.75))
    assert sorted(p.name for p in folder.iterdir()) == ["best.json", "last.json", "step-00000001"]
    assert (
        read_pointer(folder / "best.json") == read_pointer(folder / "last.json") == Pointer(step=1, top1=0.5)
    )
    go_on.set()
    writer.wait()
    assert list(saved_steps(folder)) == [2]
    assert (
        read_pointer(folder / "best.json") == read_pointer(folder / "last.json") == Pointer(step=2, top1=0.75)
    )
    writer.start(small_snapshot(3, top1=0.25))
    writer.wait()
    assert list(saved_steps(folder)) == [2, 3], "the best stays, whatever comes after it"
    assert (read_pointer(folder / "best.json").step, read_pointer(folder / "last.json").step) == (2, 3)
    assert (writer.num_saved, writer.failure) == (3, None)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_snapshot_does_not_change_while_training_continues(tmp_path: Path, device: str) -> None:
    writer = make_writer(create_run(tmp_path, CONFIG))
    weight = torch.randn(4, 3, 11, 11, device=device).to(memory_format=torch.channels_last)
    moments: dict[str, Any] = {
        "state": {0: {"momentum_buffer": weight.clone()}},
        "param_groups": [{"lr": 0.5, "params": [0]}],
    }
    expected = weight.cpu().clone(memory_format=torch.preserve_format)
    for step in (1, 2):  # the second time, into the same memory
        states = writer.staging.copy({"model": {"weight": weight}, "optimizer": moments})
        go_on = hold_back(writer)
        writer.start(dataclasses.replace(small_snapshot(step), states=states))
        weight.add_(1)
        moments["param_groups"][0]["lr"] = 0.25
        go_on.set()
        writer.wait()
        found = load_checkpoint(writer.folder / f"step-0000000{step}")
        assert torch.equal(found.model_state["weight"], expected)
        assert found.model_state["weight"].stride() == expected.stride()
        assert found.states["optimizer"]["param_groups"][0]["lr"] == (0.5 if step == 1 else 0.25)
        expected += 1
    writer.close()


def test_staging_reuses_memory_unless_the_shape_changed() -> None:
    staging = PinnedStaging()
    first = staging.copy({"a": [torch.ones(3), 7], "b": {"a": torch.zeros(2)}})
    again = staging.copy({"a": [torch.zeros(3), 8], "b": {"a": torch.zeros(2, 2)}})
    assert again["a"][0].data_ptr() == first["a"][0].data_ptr()
    assert again["a"][0].tolist() == [0, 0, 0]
    assert again["a"][1] == 8
    assert again["b"]["a"].shape == (2, 2)


def test_second_checkpoint_waits_for_the_first_and_logs_it(
    writer: AsyncCheckpointWriter, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = hold_back(writer)
    writer.start(small_snapshot(50))
    timer = threading.Timer(0.2, go_on.set)
    timer.start()
    writer.wait("step 100")
    timer.join()
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "step 100 waits: the checkpoint of step 50 is still being written"
    assert lines[1].startswith("training was held up for 0.")
    assert list(saved_steps(writer.folder)) == [50]
    writer.wait("step 100")
    assert len(caplog.records) == 2


def test_close_waits_for_the_checkpoint_in_flight(tmp_path: Path) -> None:
    folder = create_run(tmp_path, CONFIG)
    with closing(make_writer(folder)) as writer:
        go_on = hold_back(writer)
        writer.start(small_snapshot(7))
        timer = threading.Timer(0.1, go_on.set)
        timer.start()
    timer.join()
    assert load_checkpoint(folder.checkpoints / "step-00000007").step == 7


def test_failed_write_is_logged_and_cleared_by_the_next_one(
    writer: AsyncCheckpointWriter, caplog: pytest.LogCaptureFixture
) -> None:
    folder = writer.folder
    writer.start(small_snapshot(1, top1=0.5))
    writer.wait()
    folder.rename(folder.with_name("away"))
    folder.write_text("a file where the folder was")
    writer.start(small_snapshot(2, top1=0.75))
    writer.wait()
    assert str(writer.failure).endswith("step-00000002 could not be written: File exists")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage().endswith("; training goes on, and the checkpoints before it are untouched")
    assert writer.best == Pointer(step=1, top1=0.5), "what is not there cannot be the best"
    folder.unlink()
    folder.with_name("away").rename(folder)
    writer.start(small_snapshot(3))
    writer.wait()
    assert (writer.failure, list(saved_steps(folder))) == (None, [1, 3])


def test_unexpected_error_reaches_the_training_thread(writer: AsyncCheckpointWriter) -> None:
    def fail() -> None:
        raise ArithmeticError("nobody foresaw this")

    writer.before_write = fail
    writer.start(small_snapshot(1))
    with pytest.raises(ArithmeticError, match="nobody foresaw this"):
        writer.wait()
    writer.wait()
