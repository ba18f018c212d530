"""Which step a run takes: by its configuration, by a proof, or by what was found out before."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from data_pipeline.loading.batches import Batch
from tests.helpers.step_samples import small_batch, small_trainer
from tests.helpers.wrong_steps import Fast, Raises, Slow, WrongGradient, candidate, read_seconds
from train.config.load import make_config
from train.distributed.world import World, open_world
from train.graphs.choose import WORTH_IMAGES, Course, join_machines, open_step, tell_changes, why_plain
from train.graphs.trial import Held
from train.graphs.verdict import Record, read_record
from train.step import StepFn, StepParts, train_step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thin")]

SMALL = ("model.name=owt", "model.hidden_units=32", "precision=fp32")
LONG = WORTH_IMAGES
SLOW_LINE = "the plain step runs: the plain step takes 2e+03 ms; Slow is right, 3e+03 ms"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A CPU that is said to have graphs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("train.graphs.prover.time_steps", read_seconds)
    monkeypatch.setattr("train.graphs.choose.DEVICES", ("cpu",))
    before = torch.get_num_threads()
    with open_world("cpu") as one:
        torch.set_num_threads(1)
        yield one
    torch.set_num_threads(before)


def course_in(folder: Path | None, num_images: int = LONG) -> Course:
    if folder is not None:
        folder.mkdir(exist_ok=True)
    return Course(num_images=num_images, rate=1e-3, step=0, folder=folder)


def choose(
    parts: StepParts, folder: Path, kind: type[Fast], monkeypatch: pytest.MonkeyPatch
) -> tuple[StepFn, Record]:
    monkeypatch.setattr("train.graphs.choose.candidates_of", lambda _: [candidate(kind)])
    steps: Iterator[list[Batch]] = iter([[small_batch()], [small_batch()]])
    held = Held(parts)
    step, steps = open_step(parts, partial(train_step, parts), course_in(folder), steps)
    assert held.changed() == []
    assert [len(batches) for batches in steps] == [1, 1]
    record = read_record(folder / "step.json")
    assert record is not None
    return step, record


def test_proved_step_runs_and_the_next_run_knows(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = small_trainer(world, *SMALL)
    line = "the fast step runs (Fast): Fast is right, 500 ms; the plain step takes 2e+03 ms"
    with caplog.at_level(logging.INFO, "train"):
        step, record = choose(parts, tmp_path / "first", Fast, monkeypatch)
        again, other = choose(parts, tmp_path / "second", Fast, monkeypatch)
    assert isinstance(step, Fast) and isinstance(again, Fast) and again is not step
    assert record.chosen == "Fast" and other == record
    assert record.machine["torch"] == torch.__version__ and record.task["precision"] == '"fp32"'
    comparing = "comparing the fast step with the plain one, once for this machine: it can take a minute"
    assert caplog.messages == [comparing, line, f"{line}; found out earlier on this machine"]
    fast_counts = again([small_batch()], 1e-3, 0)
    assert fast_counts.integers[0] == 4


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (Slow, SLOW_LINE),
        (
            WrongGradient,
            "not WrongGradient: in float32 the gradient of features.3.weight is too large or too small by",
        ),
        (
            Raises,
            "the plain step runs: the plain step takes 2e+03 ms; not Raises: it failed with RuntimeError:",
        ),
    ],
)
def test_plain_step_runs_where_the_fast_one_is_worse(
    kind: type[Fast],
    said: str,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "train"):
        step, record = choose(small_trainer(world, *SMALL), tmp_path / "run", kind, monkeypatch)
    assert isinstance(step, partial) and record.chosen == "plain"
    assert said in caplog.messages[-1]


@pytest.mark.parametrize(
    ("overrides", "num_images", "why"),
    [
        (("fused=off",), LONG, "fused=off"),
        ((), LONG - 1, "with fewer than 4,000,000 images in all, a fast one would not gain what it costs"),
        (
            ("log_noise_scale=true", "micro_batch=2"),
            LONG,
            "log_noise_scale measures the gradient of each part",
        ),
    ],
)
def test_configuration_decides_without_a_batch(
    overrides: tuple[str, ...], num_images: int, why: str, world: World, tmp_path: Path
) -> None:
    parts = small_trainer(world, *SMALL, *overrides)
    plain, steps = partial(train_step, parts), iter(list[list[Batch]]())
    step, rest = open_step(parts, plain, course_in(tmp_path / "run", num_images), steps)
    assert step is plain and rest is steps
    record = read_record(tmp_path / "run" / "step.json")
    assert record is not None and record.chosen == "plain" and record.why.startswith(why)
    assert record.verdicts == () and not (tmp_path / "cache").exists()


def test_cpu_takes_the_plain_step() -> None:
    cpu = World(0, 1, 0, 1, torch.device("cpu"))
    assert why_plain(make_config("demo"), cpu, 10**9) == "the fast one needs a GPU"
    assert why_plain(make_config("demo"), replace(cpu, device=torch.device("cuda", 0)), 10**9) is None


def test_resume_says_what_is_otherwise(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    parts = small_trainer(world, *SMALL, "deterministic=true")
    choose(parts, folder, Fast, monkeypatch)
    caplog.clear()
    choose(parts, folder, Fast, monkeypatch)
    assert caplog.messages == []  # the same machine and step
    record = read_record(folder / "step.json")
    assert record is not None
    machine = {**record.machine, "card": "NVIDIA H100", "driver": "580.95.05"}
    (folder / "step.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(record, machine=machine)))
    choose(parts, folder, Fast, monkeypatch)
    now = record.machine
    assert caplog.messages == [
        f"this run goes on elsewhere: card was NVIDIA H100, now {now['card']}, driver was 580.95.05, now "
        f"{now['driver']}; with deterministic=true its bits may be others from here on"
    ]


def test_resume_with_another_step_says_so(caplog: pytest.LogCaptureFixture) -> None:
    earlier = Record(chosen="graph", why="faster", machine={"card": "A"}, task={})
    record = Record(chosen="plain", why="fused=off", machine={"card": "A"}, task={})
    tell_changes(earlier, record, deterministic=False)
    assert caplog.messages == ["this run had the graph step, and goes on with the plain step: fused=off"]
    caplog.clear()
    tell_changes(earlier, msgspec.structs.replace(earlier, machine={"card": "B"}), deterministic=False)
    assert caplog.messages == ["this run goes on elsewhere: card was A, now B"]


def test_machines_of_all_ranks_are_one_key() -> None:
    one, other = {"card": "A", "torch": "2.14"}, {"card": "B", "torch": "2.14"}
    assert join_machines([one, other, one]) == {"card": "A and B", "torch": "2.14"}
    assert join_machines([one]) == one


def test_step_of_a_run_without_a_folder_leaves_no_file(world: World, tmp_path: Path) -> None:
    parts = small_trainer(world, *SMALL, "fused=off")
    step, _ = open_step(parts, partial(train_step, parts), course_in(None), iter([]))
    assert isinstance(step, partial) and list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_candidates_are_right_and_one_is_chosen_on_a_gpu(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with open_world("cuda") as world:
        parts = small_trainer(world, "model.hidden_units=64", "device=cuda", f"precision={precision}")
        held = Held(parts)
        step, steps = open_step(
            parts, partial(train_step, parts), course_in(tmp_path / "run"), iter([[small_batch()]])
        )
        assert held.changed() == []
        record = read_record(tmp_path / "run" / "step.json")
        assert record is not None
        assert [verdict.against for verdict in record.verdicts] == [None, None]
        assert step(next(steps), 1e-3, 0).integers[0] == 4


def test_lent_images_are_taken_over_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder's memory is read when the batch is: the proof's steps and the first one have a copy."""
    parts, lent = small_trainer(world, *SMALL), small_batch()
    images = torch.from_numpy(np.array(lent.images))
    monkeypatch.setattr("train.graphs.choose.candidates_of", lambda _: [candidate(Fast)])
    batches = iter([[replace(lent, images=images)]])
    _, steps = open_step(parts, partial(train_step, parts), course_in(None), batches)
    ((first,),) = steps
    assert torch.equal(first.images, images)
