"""The ranks' records: which attempt counts, and samples that were not seen exactly once."""

from __future__ import annotations

from pathlib import Path

import msgspec

from scripts.soak.evidence import check_seen_once, last_whole_epoch, read_evidence
from scripts.soak.rank import StepRecord, file_name


def write_attempt(
    folder: Path, launch: int, restart: int, shares: list[dict[int, list[int]]], failed: tuple[int, ...] = ()
) -> None:
    """Evidence of one attempt: for each rank, its samples by step."""
    for rank, by_step in enumerate(shares):
        lines = [
            msgspec.json.encode(StepRecord(step=s, indices=i, failed=[f for f in failed if f in i]))
            for s, i in by_step.items()
        ]
        path = folder / file_name(launch, restart, rank, len(shares))
        path.write_bytes(b"".join(line + b"\n" for line in lines))


def problems_of(folder: Path) -> list[str]:
    return check_seen_once(read_evidence(folder, 4), num_samples=4, steps_per_epoch=2, epochs=2)


def test_soak_evidence_counts_the_last_attempt_of_each_step(tmp_path: Path) -> None:
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


def test_soak_evidence_finds_samples_not_seen_exactly_once(tmp_path: Path) -> None:
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
