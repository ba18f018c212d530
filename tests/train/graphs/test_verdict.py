"""Verdicts are kept for the next run on the machine, and for no other."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from tests.helpers.step_samples import small_trainer
from train.distributed.world import World, open_world
from train.graphs.verdict import (
    Record,
    Verdict,
    differences,
    driver_version,
    load_verdict,
    machine_of,
    processor_name,
    read_record,
    save_verdict,
    task_of,
)

MACHINE = {"card": "NVIDIA H100", "torch": "2.14"}
TASK = {"model": "owt"}
RECORD = Record(
    chosen="graph",
    why="faster",
    machine=MACHINE,
    task=TASK,
    plain_s=2.0,
    verdicts=(Verdict(name="graph", seconds=1.0),),
)


@pytest.fixture
def world() -> Iterator[World]:
    with open_world("cpu") as one:
        yield one


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "alexnet" / "steps"


def test_record_is_found_for_its_machine_and_task_alone(cache: Path) -> None:
    save_verdict(RECORD)
    assert load_verdict(MACHINE, TASK) == RECORD
    assert load_verdict({**MACHINE, "torch": "2.15"}, TASK) is None
    assert load_verdict(MACHINE, {"model": "bn"}) is None
    assert len(list(cache.iterdir())) == 1


def test_record_that_may_change_is_not_kept(cache: Path) -> None:
    moment = Verdict(name="graph", against="it failed with OutOfMemoryError", lasting=False)
    save_verdict(msgspec.structs.replace(RECORD, verdicts=(moment,)))
    save_verdict(msgspec.structs.replace(RECORD, verdicts=()))
    assert not cache.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"chosen": "graph"', "cannot be read, and is passed over: "),
        (b"\xff\xfe", "cannot be read, and is passed over: "),
        (b'{"chosen": "graph"}', "cannot be read, and is passed over: Object missing required field `why`"),
        (msgspec.json.encode(msgspec.structs.replace(RECORD, task={})), "is about another machine or step"),
    ],
)
def test_damaged_and_foreign_files_are_passed_over(
    content: bytes, said: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_verdict(RECORD)
    (path,) = cache.iterdir()
    path.write_bytes(content)
    assert load_verdict(MACHINE, TASK) is None
    (line,) = caplog.messages
    assert line.startswith(f"{path} {said}")


def test_cache_that_cannot_be_written_is_a_line(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("no folder")
    save_verdict(RECORD)
    assert len(caplog.messages) == 1
    assert "cannot be kept for the next run" in caplog.messages[0]


def test_missing_record_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_record(tmp_path / "step.json") is None and caplog.messages == []


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  Tue\nGCC version:", "580.95.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build", "570.86.15"),
        ("something else", "unknown"),
    ],
)
def test_driver_is_read_from_the_kernels_file(text: str, version: str, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "none") == "none"


@pytest.mark.slow
def test_task_tells_kernels_and_shapes_apart(world: World) -> None:
    def of(*overrides: str) -> dict[str, str]:
        return task_of(small_trainer(world, "model.hidden_units=16", *overrides))

    first = of()
    for other in (
        ("micro_batch=2",), ("ema_decay=0.9",), ("deterministic=true",), ("model.name=owt",),
        ("augment.mixup=0.2",), ("optimizer.nesterov=true",), ("spike_factor=20",),
    ):  # fmt: skip
        differing = {key for key, value in of(*other).items() if value != first[key]}
        assert differing - {"layers"} and len(differing) < 3, (other, differing)
    parts = small_trainer(world, "model.hidden_units=16")
    parts.network.features.norm1 = torch.nn.Identity()
    assert {key for key, value in task_of(parts).items() if value != first[key]} == {"layers"}
    for same in (("seed=7",), ("epochs=3",), ("schedule.learning_rate=0.5",), ("log_every=7",)):
        assert of(*same) == first


def test_machine_is_described_and_compared() -> None:
    machine = machine_of(torch.device("cpu"))
    assert machine["torch"] == torch.__version__ and len(machine["source"]) == 16
    assert machine["card"] not in ("", "none") and machine["cudnn"] == "none"
    other = {**machine, "card": "NVIDIA H100", "driver": "580.95.05"}
    record = msgspec.structs.replace(RECORD, machine=other)
    assert differences(record, other) == []
    assert f"card was NVIDIA H100, now {machine['card']}" in differences(record, machine)


def test_processor_has_its_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: AMD EPYC 9V74\nflags : x\n")
    assert processor_name(tmp_path / "cpuinfo") == "CPU AMD EPYC 9V74"
    assert processor_name(tmp_path / "none") == f"CPU {platform.machine()}"
