"""The ranks' records, merged: which attempt did each step for good, and whether each sample was seen once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import msgspec

from scripts.soak.rank import StepRecord


@dataclass(frozen=True)
class Step:
    """One step that counts, over all ranks.

    Attributes:
        world_size: how many ranks did it.
        indices: its samples, in rank order.
        failed: those that could not be read.
    """

    world_size: int
    indices: tuple[int, ...]
    failed: tuple[int, ...]


@dataclass(frozen=True)
class Evidence:
    """The records of a run.

    Attributes:
        steps: those that count, by their number from 1: of each step the last attempt that did it.
        num_done: steps done in all attempts together.
        problems: steps that a rank did not record, one line each.
    """

    steps: dict[int, Step]
    num_done: int
    problems: list[str]


def read_evidence(folder: Path, total_steps: int) -> Evidence:
    """Read and merge the files of a run.

    An attempt that resumes after step s takes back all later steps of the attempts before it. So, from the
    newest attempt backwards, each one counts up to where a newer one began.
    """
    attempts: dict[tuple[int, int], dict[int, dict[int, StepRecord]]] = {}
    world_sizes: dict[tuple[int, int], int] = {}
    for path in sorted(folder.glob("*.jsonl")):
        launch, restart, _, rank, _, size = path.stem.split("-")
        key = int(launch), int(restart)
        world_sizes[key] = int(size)
        records = [msgspec.json.decode(line, type=StepRecord) for line in path.read_bytes().splitlines()]
        attempts.setdefault(key, {})[int(rank)] = {record.step: record for record in records}
    steps: dict[int, Step] = {}
    problems: list[str] = []
    num_done, bound = 0, total_steps + 1
    for key in sorted(attempts, reverse=True):
        ranks, world_size = attempts[key], world_sizes[key]
        numbers = sorted({number for of_rank in ranks.values() for number in of_rank})
        num_done += len(numbers)
        for number in (n for n in numbers if n < bound):
            records = [ranks[rank][number] for rank in range(world_size) if number in ranks.get(rank, {})]
            if len(records) < world_size:
                problems.append(
                    f"step {number} counts, but only {len(records)} of {world_size} ranks of launch "
                    f"{key[0]}, attempt {key[1]} did it"
                )
            steps[number] = Step(
                world_size,
                tuple(index for record in records for index in record.indices),
                tuple(index for record in records for index in record.failed),
            )
        bound = min([bound, *numbers])
    return Evidence(steps, num_done, problems)


def check_seen_once(evidence: Evidence, *, num_samples: int, steps_per_epoch: int, epochs: int) -> list[str]:
    """Problems, one line each; none where every sample of every epoch was seen exactly once."""
    problems = list(evidence.problems)
    for epoch in range(epochs):
        numbers = range(epoch * steps_per_epoch + 1, (epoch + 1) * steps_per_epoch + 1)
        missing = [number for number in numbers if number not in evidence.steps]
        if missing:
            problems.append(f"epoch {epoch + 1}: no evidence of step(s) {', '.join(map(str, missing))}")
        seen = Counter(i for n in numbers if n in evidence.steps for i in evidence.steps[n].indices)
        never = sorted(set(range(num_samples)) - seen.keys())
        often = sorted(index for index, count in seen.items() if count > 1)
        if never:
            problems.append(f"epoch {epoch + 1}: {len(never)} sample(s) never seen, the first is {never[0]}")
        if often:
            problems.append(
                f"epoch {epoch + 1}: {len(often)} sample(s) seen more than once, such as {often[0]}"
            )
    return problems


def last_whole_epoch(evidence: Evidence, index: int, *, steps_per_epoch: int) -> int:
    """The last epoch, counted from 0, in which a sample could be read; -1 where there is none."""
    whole = [
        (number - 1) // steps_per_epoch
        for number, step in evidence.steps.items()
        if index in step.indices and index not in step.failed
    ]
    return max(whole, default=-1)
