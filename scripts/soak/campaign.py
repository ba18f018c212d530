"""A soak: pairs of runs under faults until the time is up, each compared with an undisturbed run."""

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
from scripts.soak.compare import compare_runs
from scripts.soak.disk import Disk, small_disk
from scripts.soak.evidence import Evidence, check_seen_once, last_whole_epoch, read_evidence
from scripts.soak.faulty_run import FaultyRun, RunSpec, train_undisturbed
from scripts.soak.plan import (
    KINDS,
    NUM_SAMPLES,
    READ_AHEAD_STEPS,
    STEPS_PER_EPOCH,
    make_plan,
    steps_of,
)
from scripts.soak.report import Report, RunReport

log = logging.getLogger("train")

CHOICES = (1, 2, 3)
"""Numbers of ranks of the runs in which they change."""

SHORT_MINUTES = 5.0
"""Below this length a soak has short runs."""


@dataclass(frozen=True)
class Size:
    """Size of a pair of runs: epochs, and faults with a fixed and with a changing number of ranks."""

    epochs: int
    num_faults_fixed: int
    num_faults_changing: int


def soak(minutes: float, seed: int, out: Path) -> Report:
    """Train under faults for about so many minutes: as many pairs of runs as come closest, at least one.

    Each pair has a seed of its own. Its first run keeps its number of ranks, and is compared with an
    undisturbed run in every bit; its second changes it with every launch, and is compared with the same
    undisturbed run in its samples.

    Args:
        out: a new folder; logs and evidence stay in it, runs that were good do not.
    Raises:
        UserError: `out` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is there already: give --out a new folder")
    started, longest = time.monotonic(), 0.0
    demo = out / "demo"
    write_demo(demo)
    size = Size(2, 7, 3) if minutes < SHORT_MINUTES else Size(6, 10, 8)
    rounds: list[RunReport] = []
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


def soak_pair(
    seed: int, size: Size, folder: Path, demo: Path, not_injected: dict[str, str]
) -> list[RunReport]:
    """Make the two runs of a pair, and the undisturbed one.

    Args:
        not_injected: receives the kinds of fault that were left out, and why.
    """
    fixed, changing, undisturbed = (
        RunSpec(seed, size.epochs, folder / name, demo) for name in ("fixed", "changing", "undisturbed")
    )
    with ExitStack() as stack:
        run = _train(fixed, size.num_faults_fixed, (), stack, not_injected)
        evidence = read_evidence(fixed.folder / "evidence", fixed.total_steps)
        corrupted = {
            index: (last_whole_epoch(evidence, index, steps_per_epoch=STEPS_PER_EPOCH), content)
            for index, content in run.target.corrupted.items()
        }
        undisturbed.prepare()
        log.info(
            f"seed {seed}: the undisturbed run, with {len(corrupted)} image(s) corrupted at the same places"
        )
        reference, reference_s = train_undisturbed(undisturbed, undisturbed.folder / "runs", corrupted)
        expected = read_evidence(undisturbed.folder / "evidence", undisturbed.total_steps)
        first = check_run(run, evidence, expected, reference, reference_s)
        shutil.rmtree(reference)
        if first.good:
            shutil.rmtree(run.runs)
    with ExitStack() as stack:
        run = _train(changing, size.num_faults_changing, CHOICES, stack, not_injected)
        evidence = read_evidence(changing.folder / "evidence", changing.total_steps)
        second = check_run(run, evidence, expected, None, reference_s)
        if second.good:
            shutil.rmtree(run.runs)
    return [first, second]


def _train(
    spec: RunSpec, num_faults: int, choices: tuple[int, ...], stack: ExitStack, not_injected: dict[str, str]
) -> FaultyRun:
    spec.folder.mkdir(parents=True)
    spec.prepare()
    disk = stack.enter_context(small_disk(spec.folder / "disk"))
    kinds = KINDS
    if isinstance(disk, str):
        not_injected["fill_disk"], kinds = disk, tuple(kind for kind in KINDS if kind != "fill_disk")
    runs = spec.folder / "disk" / "runs"
    runs.mkdir()
    plan_seed = 2 * spec.seed + bool(choices)
    plan = make_plan(plan_seed, num_faults=num_faults, total_steps=spec.total_steps, kinds=kinds)
    log.info(f"seed {spec.seed}: {spec.total_steps} steps, {num_faults} faults, ranks {choices or 2}")
    run = FaultyRun(spec, plan, choices, runs, disk if isinstance(disk, Disk) else None)
    run.train()
    return run


def check_run(
    run: FaultyRun, evidence: Evidence, expected: Evidence, reference: Path | None, undisturbed_s: float
) -> RunReport:
    """Compare a run with the undisturbed one.

    Args:
        evidence, expected: records of the two.
        reference: the undisturbed run's folder; None where only the samples are compared.
    """
    spec, problems = run.spec, list(run.problems)
    not_once = check_seen_once(
        evidence, num_samples=NUM_SAMPLES, steps_per_epoch=STEPS_PER_EPOCH, epochs=spec.epochs
    )
    pairs = {n: (evidence.steps.get(n), step) for n, step in expected.steps.items()}
    odd = [n for n, (found, step) in pairs.items() if found is None or found.indices != step.indices]
    if odd:
        problems.append(
            f"{len(odd)} steps hold other samples than the undisturbed run's, the first is step {odd[0]}"
        )
    failed = sorted({index for step in evidence.steps.values() for index in step.failed})
    problems += not_once + check_corrupted(run, evidence, failed)
    state_equal = rows_equal = None
    if reference is not None and not run.problems:
        if any(found is not None and found.failed != step.failed for found, step in pairs.values()):
            problems.append(
                "the undisturbed run read a corrupted image at another place: the two do not compare"
            )
        state_equal, rows_equal = compare_runs(run.run, reference)
        problems += [] if state_equal else ["the last state differs from the undisturbed run's"]
        problems += [] if rows_equal else ["the rows of metrics.jsonl differ from the undisturbed run's"]
    path_at = load_image_folder(spec.folder / "data", "train").path_at
    return RunReport(
        seed=spec.seed,
        ranks=run.ranks,
        hits=run.hits,
        too_late=run.too_late,
        steps=spec.total_steps,
        steps_done=evidence.num_done,
        state_equal=state_equal,
        rows_equal=rows_equal,
        samples_once=not not_once,
        stream_equal=not odd,
        failed_images=[f"{path_at(i).parent.name}/{path_at(i).name}" for i in failed],
        wall_s=round(run.wall_s, 1),
        undisturbed_s=round(undisturbed_s, 1),
        problems=problems,
    )


def check_corrupted(run: FaultyRun, evidence: Evidence, failed: list[int]) -> list[str]:
    """Problems unless corrupted images, and no others, are left out from then on, by name."""
    spec, corrupted, problems = run.spec, run.target.corrupted, []
    if strange := set(failed) - corrupted.keys():
        problems.append(
            f"{len(strange)} image(s) were left out that nobody corrupted, such as {min(strange)}"
        )
    logs = "".join(path.read_text(errors="replace") for path in sorted(spec.folder.glob("launch-*.log")))
    steps = steps_of(spec.seed, spec.epochs)
    path_at = load_image_folder(spec.folder / "data", "train").path_at
    for index, hit in zip(corrupted, (h for h in run.hits if h.kind == "corrupt_image"), strict=True):
        late = [
            int(s) for s in steps[:, index] if s > hit.at_step + READ_AHEAD_STEPS and int(s) in evidence.steps
        ]
        if any(index not in evidence.steps[s].failed for s in late):
            problems.append(f"{hit.what} at step {hit.at_step}, and a later step took it all the same")
        if index in failed and f"left out {path_at(index)}: " not in logs:
            problems.append(f"{hit.what}, which was left out without its name")
    return problems
