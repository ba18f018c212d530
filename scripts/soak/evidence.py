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
    attempts: dict[tuple[int, int, int], list[dict[int, StepRecord]]] = {}
    decoder = msgspec.json.Decoder(StepRecord)
    for path in sorted(folder.glob("*.jsonl")):
        launch, restart, _, _, _, world_size = path.stem.split("-")
        records = decoder.decode_lines(path.read_bytes())
        of_ranks = attempts.setdefault((int(launch), int(restart), int(world_size)), [])
        of_ranks.append({record.step: record for record in records})
    steps: dict[int, Step] = {}
    problems: list[str] = []
    num_done, bound = 0, total_steps + 1
    for (launch_number, attempt, num_ranks), of_ranks in sorted(attempts.items(), reverse=True):
        numbers = sorted(set().union(*of_ranks))
        num_done += len(numbers)
        for number in (n for n in numbers if n < bound):
            records = [of_rank[number] for of_rank in of_ranks if number in of_rank]
            if len(records) < num_ranks:
                problems.append(
                    f"step {number} counts, but only {len(records)} of {num_ranks} ranks of launch "
                    f"{launch_number}, attempt {attempt} did it"
                )
            steps[number] = Step(
                num_ranks,
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
