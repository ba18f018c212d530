"""The soak itself: its plan, how it reads evidence, and the two-minute version under a real torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from scripts.soak.compare import equal_trees
from scripts.soak.evidence import check_seen_once, last_whole_epoch, read_evidence
from scripts.soak.faulty_run import FaultyRun, RunSpec
from scripts.soak.plan import (
    KINDS,
    NUM_SAMPLES,
    READ_AHEAD_STEPS,
    STEPS_PER_EPOCH,
    corruptible,
    make_plan,
    next_ranks,
    steps_of,
)
from scripts.soak.rank import StepRecord, file_name
from scripts.soak.report import Report, readable
from tests.helpers.ranks import REPOSITORY


def test_a_plan_follows_from_its_seed_and_has_every_kind_once_before_any_twice() -> None:
    plan = make_plan(7, num_faults=10, total_steps=84)
    assert plan == make_plan(7, num_faults=10, total_steps=84) != make_plan(8, num_faults=10, total_steps=84)
    assert {fault.kind for fault in plan[: len(KINDS)]} == set(KINDS)
    steps = [fault.step for fault in plan]
    assert steps == sorted(steps) and steps[0] >= 2 and steps[-1] <= 80


def test_the_number_of_ranks_changes_where_there_is_a_choice() -> None:
    assert {next_ranks(draw, 2, (1, 2, 3)) for draw in range(4)} == {1, 3}
    assert next_ranks(5, 2, ()) == 2


def test_images_are_corrupted_only_where_an_undisturbed_run_can_have_them_so_too() -> None:
    steps = steps_of(3, epochs=6)
    for epoch in range(6):  # each step of an epoch takes its share of all images
        assert np.unique(steps[epoch], return_counts=True)[1].tolist() == [103] * STEPS_PER_EPOCH
    chosen = corruptible(3, epochs=6)
    assert 50 < len(chosen) < NUM_SAMPLES
    assert (np.diff(steps[:, chosen], axis=0) > READ_AHEAD_STEPS).all()


def write_attempt(
    folder: Path, launch: int, restart: int, shares: list[dict[int, list[int]]], failed: tuple[int, ...] = ()
) -> None:
    """Evidence of one attempt: for each rank, its samples by step."""
    for rank, by_step in enumerate(shares):
        lines = [
            msgspec.json.encode(StepRecord(step=s, indices=i, failed=[f for f in failed if f in i], time=0.0))
            for s, i in by_step.items()
        ]
        path = folder / file_name(launch, restart, rank, len(shares))
        path.write_bytes(b"".join(line + b"\n" for line in lines))


def problems_of(folder: Path) -> list[str]:
    return check_seen_once(read_evidence(folder, 4), num_samples=4, steps_per_epoch=2, epochs=2)


def test_evidence_counts_the_last_attempt_of_each_step(tmp_path: Path) -> None:
    """Two ranks do three steps and are lost; one rank goes on after step 1; three go on after step 3."""
    write_attempt(tmp_path, 0, 0, [{1: [0], 2: [2], 3: [1]}, {1: [1], 2: [3], 3: [3]}])
    write_attempt(tmp_path, 0, 1, [{2: [2, 3], 3: [1, 3], 4: [0, 0]}], failed=(3,))
    write_attempt(tmp_path, 1, 0, [{4: [0]}, {4: [2]}, {4: []}])
    evidence = read_evidence(tmp_path, 4)
    assert problems_of(tmp_path) == []
    assert evidence.num_done == 7
    assert [evidence.steps[n].world_size for n in (1, 2, 3, 4)] == [2, 1, 1, 3]
    assert evidence.steps[2].failed == evidence.steps[3].failed == (3,)
    assert last_whole_epoch(evidence, 3, steps_per_epoch=2) == -1
    assert last_whole_epoch(evidence, 1, steps_per_epoch=2) == 1


def test_what_was_not_seen_exactly_once_is_found(tmp_path: Path) -> None:
    write_attempt(tmp_path, 0, 0, [{1: [0, 1], 2: [2, 3], 3: [1, 3]}])
    assert problems_of(tmp_path) == [
        "epoch 2: no evidence of step(s) 4",
        "epoch 2: 2 sample(s) never seen, the first is 0",
    ]
    write_attempt(tmp_path, 0, 1, [{4: [0, 3]}])
    assert problems_of(tmp_path) == [
        "epoch 2: 1 sample(s) never seen, the first is 2",
        "epoch 2: 1 sample(s) seen more than once, such as 3",
    ]
    write_attempt(tmp_path, 0, 2, [{4: [0]}, {}])
    assert problems_of(tmp_path)[0] == ("step 4 counts, but only 1 of 2 ranks of launch 0, attempt 2 did it")


def test_two_states_are_the_same_only_bit_for_bit() -> None:
    one = {"model": {"w": torch.tensor([1.0, 2.0])}, "steps": [1, 2]}
    assert equal_trees(one, {"model": {"w": torch.tensor([1.0, 2.0])}, "steps": [1, 2]})
    assert not equal_trees(one, {"model": {"w": torch.tensor([1.0, 2.0 + 2.0**-22])}, "steps": [1, 2]})
    assert not equal_trees(
        one, {"model": {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}, "steps": [1, 2]}
    )
    assert not equal_trees(one, {"model": {}, "steps": [1, 2]})


@pytest.mark.timeout(900)
def test_the_two_minute_soak(tmp_path: Path) -> None:
    """About 100 s on two quiet cores: faults of every kind, on two ranks and on a changing number of them."""
    done = subprocess.run(
        [sys.executable, "-m", "scripts.soak", "--minutes=2", "--seed=1", "--json",
         f"--out={tmp_path / 'soak'}"],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=880,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = msgspec.json.decode(done.stdout, type=Report)
    assert "all good" in readable(report)
    fixed, changing = report.rounds
    assert (fixed.state_equal, fixed.rows_equal, fixed.samples_once, fixed.stream_equal) == (True,) * 4
    assert (changing.samples_once, changing.stream_equal) == (True, True)
    assert set(fixed.ranks) == {2} and len(set(changing.ranks)) > 1
    expected = set(KINDS) if os.geteuid() == 0 and not report.not_injected else set(KINDS) - {"fill_disk"}
    assert set(report.injected) == expected
    assert report.survived == report.injected
    assert len(fixed.failed_images) == 1
    assert report.steps_done_again > 0 and report.lost_s > 0
    assert (tmp_path / "soak" / "report.json").is_file()


def test_a_run_killed_before_its_first_checkpoint_is_not_the_one_that_is_judged(tmp_path: Path) -> None:
    spec = RunSpec(seed=0, epochs=1, folder=tmp_path, demo=tmp_path)
    disturbed = FaultyRun(spec, [], (), tmp_path / "runs", None)
    for name in ("demo-20260101T000000Z", "demo-20260101T000009Z"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert disturbed.run.name == "demo-20260101T000009Z"
