"""A soak: pairs of runs under faults until the time is up, each compared with an undisturbed run."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.demo import write_demo
from scripts.soak.compare import compare_runs
from scripts.soak.evidence import Evidence, check_seen_once, last_whole_epoch
from scripts.soak.faulty_run import FaultyRun, train_undisturbed
from scripts.soak.launch import RunSpec, small_disk
from scripts.soak.plan import KINDS, NUM_SAMPLES, READ_AHEAD_STEPS, STEPS_PER_EPOCH, make_plan, steps_of
from scripts.soak.report import Report, RunReport

log = logging.getLogger("train")

CHOICES = (1, 2, 3)
"""Numbers of ranks of the runs in which they change."""

SHORT_MINUTES = 5.0
"""Below this length a soak has short runs."""


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
    write_demo(out / "demo")
    epochs, num_faults = (2, (7, 1)) if minutes < SHORT_MINUTES else (6, (10, 8))
    rounds: list[RunReport] = []
    not_injected: dict[str, str] = {}
    while not rounds or time.monotonic() - started + longest / 2 <= 60 * minutes:
        began, pair_seed = time.monotonic(), seed + len(rounds) // 2
        rounds += soak_pair(pair_seed, epochs, num_faults, out, not_injected)
        longest = max(longest, time.monotonic() - began)
    wall_s = round(time.monotonic() - started, 1)
    return Report(seed=seed, minutes=minutes, wall_s=wall_s, rounds=rounds, not_injected=not_injected)


def soak_pair(
    seed: int, epochs: int, num_faults: tuple[int, int], out: Path, not_injected: dict[str, str]
) -> list[RunReport]:
    """Make the two runs of a pair, and the undisturbed one.

    Args:
        num_faults: of the run with a fixed and of the one with a changing number of ranks.
        out: folder of the soak, with the demo data.
        not_injected: receives the kinds of fault that were left out, and why.
    """
    fixed, changing, undisturbed = (
        RunSpec(seed, epochs, out / f"pair-{seed}" / name) for name in ("fixed", "changing", "undisturbed")
    )
    for spec in (fixed, changing, undisturbed):
        spec.prepare(out / "demo")
    with _trained(fixed, num_faults[0], (), not_injected) as first:
        evidence = fixed.evidence()
        corrupted = {
            index: (last_whole_epoch(evidence, index, steps_per_epoch=STEPS_PER_EPOCH), content)
            for index, content in first.damage.images.items()
        }
        log.info(
            f"seed {seed}: the undisturbed run, with {len(corrupted)} image(s) corrupted at the same places"
        )
        undisturbed_s = train_undisturbed(undisturbed, corrupted)
        check_run(first, undisturbed, undisturbed_s)
    shutil.rmtree(undisturbed.runs)
    with _trained(changing, num_faults[1], CHOICES, not_injected) as second:
        check_run(second, undisturbed, undisturbed_s)
    return [first.report, second.report]


@contextmanager
def _trained(
    spec: RunSpec, num_faults: int, choices: tuple[int, ...], not_injected: dict[str, str]
) -> Iterator[FaultyRun]:
    """Train under faults. The run's files last as long as the context; a run that was good is removed."""
    with small_disk(spec.disk) as no_disk:
        if no_disk:
            not_injected["fill_disk"] = no_disk
        kinds = tuple(kind for kind in KINDS if kind not in not_injected)
        plan_seed = 2 * spec.seed + bool(choices)
        plan = make_plan(plan_seed, num_faults=num_faults, total_steps=spec.total_steps, kinds=kinds)
        log.info(f"seed {spec.seed}: {spec.total_steps} steps, {num_faults} faults, ranks {choices or 2}")
        run = FaultyRun(spec, plan, choices)
        run.train()
        yield run
        if run.report.good:
            shutil.rmtree(spec.runs)


def check_run(run: FaultyRun, undisturbed: RunSpec, undisturbed_s: float) -> None:
    """Compare a run with the undisturbed one, and complete its report.

    With a fixed number of ranks the two are compared in every bit, else in their samples only.
    """
    spec, report = run.spec, run.report
    bit_for_bit = not run.choices and not report.problems
    evidence, expected = spec.evidence(), undisturbed.evidence()
    not_once = check_seen_once(
        evidence, num_samples=NUM_SAMPLES, steps_per_epoch=STEPS_PER_EPOCH, epochs=spec.epochs
    )
    pairs = {n: (evidence.steps.get(n), step) for n, step in expected.steps.items()}
    odd = [n for n, (found, step) in pairs.items() if found is None or found.indices != step.indices]
    if odd:
        report.problems.append(
            f"{len(odd)} steps hold other samples than the undisturbed run's, the first is step {odd[0]}"
        )
    failed = sorted({index for step in evidence.steps.values() for index in step.failed})
    report.problems += not_once + check_corrupted(run, evidence, failed)
    if bit_for_bit:
        if any(found is not None and found.failed != step.failed for found, step in pairs.values()):
            report.problems.append(
                "the undisturbed run read a corrupted image at another place: the two do not compare"
            )
        report.state_equal, report.rows_equal = compare_runs(spec.run, undisturbed.run)
        if not report.state_equal:
            report.problems.append("the last state differs from the undisturbed run's")
        if not report.rows_equal:
            report.problems.append("the rows of metrics.jsonl differ from the undisturbed run's")
    report.steps_done = evidence.num_done
    report.samples_once, report.stream_equal = not not_once, not odd
    report.failed_images = [f"{path.parent.name}/{path.name}" for path in map(spec.image, failed)]
    report.undisturbed_s = round(undisturbed_s, 1)


def check_corrupted(run: FaultyRun, evidence: Evidence, failed: list[int]) -> list[str]:
    """Problems unless corrupted images, and no others, are left out from then on, by name."""
    spec, corrupted, problems = run.spec, run.damage.images, []
    if strange := set(failed) - corrupted.keys():
        problems.append(
            f"{len(strange)} image(s) were left out that nobody corrupted, such as {min(strange)}"
        )
    logs = "".join(path.read_text(errors="replace") for path in sorted(spec.folder.glob("launch-*.log")))
    steps = steps_of(spec.seed, spec.epochs)
    for index, hit in zip(corrupted, (h for h in run.report.hits if h.kind == "corrupt_image"), strict=True):
        late = (evidence.steps.get(int(n)) for n in steps[:, index] if n > hit.at_step + READ_AHEAD_STEPS)
        if any(step is not None and index not in step.failed for step in late):
            problems.append(f"{hit.what} at step {hit.at_step}, and a later step took it all the same")
        if index in failed and f"left out {spec.image(index)}: " not in logs:
            problems.append(f"{hit.what}, which was left out without its name")
    return problems
