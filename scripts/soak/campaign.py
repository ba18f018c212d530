"""A soak: runs under faults, in pairs, until the time is up."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.demo import write_demo
from data_pipeline.datasets.image_folder import load_image_folder
from scripts.soak.disk import Disk, small_disk
from scripts.soak.evidence import Evidence, check_once, last_whole_epoch, read_evidence
from scripts.soak.plan import (
    KINDS,
    NUM_SAMPLES,
    READ_AHEAD_STEPS,
    STEPS_PER_EPOCH,
    Kind,
    make_plan,
    steps_of,
)
from scripts.soak.report import Report, Round
from scripts.soak.rounds import Course, Disturbed, compare_runs, train_undisturbed

log = logging.getLogger("train")

CHOICES = (1, 2, 3)
"""Numbers of ranks where they change."""

SHORT_MINUTES = 5.0
"""A soak that is to be shorter has short runs."""


@dataclass(frozen=True)
class Size:
    """Of a pair of runs: epochs, and faults for the run with a fixed and with a changing number of ranks."""

    epochs: int
    num_faults_fixed: int
    num_faults_changing: int


def soak(minutes: float, seed: int, out: Path) -> Report:
    """Train under faults for about so many minutes: as many pairs of runs as come closest, at least one.

    Each pair has a seed of its own. Its first run keeps its number of ranks, and is then held against an
    undisturbed one; its second changes it with every launch, and is held against the same one's samples.

    Args:
        out: a new folder; logs and evidence stay in it, runs that were good do not.
    Raises:
        UserError: `out` is there already.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is there already: give --out a new folder")
    started, longest = time.monotonic(), 0.0
    demo = out / "demo"
    write_demo(demo)
    size = Size(2, 7, 3) if minutes < SHORT_MINUTES else Size(6, 10, 8)
    rounds: list[Round] = []
    not_injected: dict[str, str] = {}
    while not rounds or time.monotonic() - started + longest / 2 <= 60 * minutes:
        began, pair_seed = time.monotonic(), seed + len(rounds) // 2
        rounds += soak_pair(pair_seed, size, out / f"pair-{pair_seed}", demo, not_injected)
        longest = max(longest, time.monotonic() - began)
    return Report(
        seed=seed,
        minutes=minutes,
        wall_s=round(time.monotonic() - started, 1),
        rounds=rounds,
        not_injected=not_injected,
    )


def soak_pair(seed: int, size: Size, folder: Path, demo: Path, not_injected: dict[str, str]) -> list[Round]:
    """The two runs of a pair, and the undisturbed one.

    Args:
        not_injected: is told which kinds of fault were left out, and why.
    """
    fixed = Course(seed, size.epochs, folder / "fixed", demo)
    changing = Course(seed, size.epochs, folder / "changing", demo)
    undisturbed = Course(seed, size.epochs, folder / "undisturbed", demo)
    with ExitStack() as stack:
        disturbed = _train(fixed, size.num_faults_fixed, (), stack, not_injected)
        evidence = read_evidence(fixed.folder / "evidence", fixed.total_steps)
        corrupted = {
            index: (last_whole_epoch(evidence, index, steps_per_epoch=STEPS_PER_EPOCH), content)
            for index, content in disturbed.victim.corrupted.items()
        }
        undisturbed.prepare()
        log.info(
            f"seed {seed}: the undisturbed run, with {len(corrupted)} image(s) corrupted at the same places"
        )
        reference, reference_s = train_undisturbed(undisturbed, undisturbed.folder / "runs", corrupted)
        expected = read_evidence(undisturbed.folder / "evidence", undisturbed.total_steps)
        first = judge(fixed, disturbed, evidence, expected, reference, reference_s)
        shutil.rmtree(reference)
        if first.good:
            shutil.rmtree(disturbed.runs)
    with ExitStack() as stack:
        disturbed = _train(changing, size.num_faults_changing, CHOICES, stack, not_injected)
        evidence = read_evidence(changing.folder / "evidence", changing.total_steps)
        second = judge(changing, disturbed, evidence, expected, None, reference_s)
        if second.good:
            shutil.rmtree(disturbed.runs)
    return [first, second]


def _train(
    course: Course, num_faults: int, choices: tuple[int, ...], stack: ExitStack, not_injected: dict[str, str]
) -> Disturbed:
    course.folder.mkdir(parents=True)
    course.prepare()
    disk = stack.enter_context(small_disk(course.folder / "disk"))
    kinds: tuple[Kind, ...] = KINDS
    if isinstance(disk, str):
        not_injected["fill_disk"], kinds = disk, tuple(kind for kind in KINDS if kind != "fill_disk")
    runs = course.folder / "disk" / "runs"
    runs.mkdir()
    plan_seed = 2 * course.seed + bool(choices)
    plan = make_plan(plan_seed, num_faults=num_faults, total_steps=course.total_steps, kinds=kinds)
    log.info(f"seed {course.seed}: {course.total_steps} steps, {num_faults} faults, ranks {choices or 2}")
    disturbed = Disturbed(course, plan, choices, runs, disk if isinstance(disk, Disk) else None)
    disturbed.train()
    return disturbed


def judge(
    course: Course,
    disturbed: Disturbed,
    evidence: Evidence,
    expected: Evidence,
    reference: Path | None,
    undisturbed_s: float,
) -> Round:
    """Hold a run against the undisturbed one.

    Args:
        evidence, expected: of the two.
        reference: the undisturbed run's folder; None where only the samples compare.
    """
    problems = list(disturbed.problems)
    not_once = check_once(
        evidence, num_samples=NUM_SAMPLES, steps_per_epoch=STEPS_PER_EPOCH, epochs=course.epochs
    )
    odd = [
        n
        for n, step in expected.steps.items()
        if n not in evidence.steps or evidence.steps[n].indices != step.indices
    ]
    if odd:
        problems.append(
            f"{len(odd)} steps hold other samples than the undisturbed run's, the first is step {odd[0]}"
        )
    failed = sorted({index for step in evidence.steps.values() for index in step.failed})
    problems += not_once + check_corrupted(course, disturbed, evidence, failed)
    state_equal = rows_equal = None
    if reference is not None and not disturbed.problems:
        if any(
            evidence.steps[n].failed != step.failed
            for n, step in expected.steps.items()
            if n in evidence.steps
        ):
            problems.append(
                "the undisturbed run read a corrupted image at another place: the two do not compare"
            )
        state_equal, rows_equal = compare_runs(disturbed.run, reference)
        problems += [] if state_equal else ["the last state differs from the undisturbed run's"]
        problems += [] if rows_equal else ["the rows of metrics.jsonl differ from the undisturbed run's"]
    path_at = load_image_folder(course.folder / "data", "train").path_at
    return Round(
        seed=course.seed,
        ranks=disturbed.ranks,
        hits=disturbed.hits,
        too_late=disturbed.too_late,
        steps=course.total_steps,
        steps_done=evidence.num_done,
        state_equal=state_equal,
        rows_equal=rows_equal,
        samples_once=not not_once,
        stream_equal=not odd,
        failed_images=[f"{path_at(i).parent.name}/{path_at(i).name}" for i in failed],
        wall_s=round(disturbed.wall_s, 1),
        undisturbed_s=round(undisturbed_s, 1),
        problems=problems,
    )


def check_corrupted(course: Course, disturbed: Disturbed, evidence: Evidence, failed: list[int]) -> list[str]:
    """Corrupted images weigh nothing from then on and are named; no other image is left out."""
    corrupted, problems = disturbed.victim.corrupted, []
    if strange := set(failed) - corrupted.keys():
        problems.append(
            f"{len(strange)} image(s) were left out that nobody corrupted, such as {min(strange)}"
        )
    logs = "".join(path.read_text(errors="replace") for path in sorted(course.folder.glob("launch-*.log")))
    steps, path_at = (
        steps_of(course.seed, course.epochs),
        load_image_folder(course.folder / "data", "train").path_at,
    )
    for index, hit in zip(corrupted, (h for h in disturbed.hits if h.kind == "corrupt_image"), strict=True):
        late = [
            int(s) for s in steps[:, index] if s > hit.at_step + READ_AHEAD_STEPS and int(s) in evidence.steps
        ]
        if any(index not in evidence.steps[s].failed for s in late):
            problems.append(f"{hit.what} at step {hit.at_step}, and a later step took it all the same")
        if index in failed and f"left out {path_at(index)}: " not in logs:
            problems.append(f"{hit.what}, which was left out without its name")
    return problems
