"""Chooses the step of a run: the plain one, or a fast one that is proved right and faster on its card."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from data_pipeline.loading.batches import Batch
from train.config.schema import RunConfig
from train.distributed.world import World
from train.graphs.capture import Capture, CudaCapture
from train.graphs.fast_step import FastStep, why_not
from train.graphs.fused_forward import make_fused_step, why_modules
from train.graphs.prove import Question, prove, start_again
from train.graphs.trial import Candidate
from train.graphs.verdict import (
    FILE,
    PLAIN,
    Record,
    differences,
    load_verdict,
    machine_of,
    read_record,
    task_of,
)
from train.inputs.pass_inputs import images_on_device
from train.kernels.interface import Kernels, triton_kernels
from train.runs.folder import save_json
from train.step import StepFn, StepParts

log = logging.getLogger("train")

WORTH_IMAGES = 4_000_000
"""Images that a whole run trains on, from which on a fast step gains more than it costs. An estimate, not
measured: a minute to compile, capture and compare, against 15 microseconds an image."""
DEVICES = ("cuda",)
"""Types of devices that have graphs."""


@dataclass(frozen=True)
class Course:
    """Properties of a run that the choice of its step depends on.

    Attributes:
        num_images: that the whole run trains on, wherever it is resumed.
        rate: the highest learning rate of its schedule.
        step: optimiser steps finished.
        folder: the run's, on rank 0; None on others, and where a run leaves no files.
    """

    num_images: int
    rate: float
    step: int
    folder: Path | None


def why_plain(config: RunConfig, world: World, num_images: int) -> str | None:
    """Return why a run takes the plain step, as far as its configuration tells; None if a proof decides.

    It depends on the run alone, and not on where it is resumed.
    """
    if config.fused == "off":
        return "fused=off"
    if world.device.type not in DEVICES:
        return "the fast one needs a GPU"
    if num_images < WORTH_IMAGES:
        return f"with fewer than {WORTH_IMAGES:,} images in all, a fast one would not gain what it costs"
    return why_not(config, world)


def open_step(
    parts: StepParts, plain: StepFn, course: Course, steps: Iterator[list[Batch]]
) -> tuple[StepFn, Iterator[list[Batch]]]:
    """Choose the step of a run on its first batch, and write the choice to `step.json` in its folder.

    Every rank must call this; all get the same kind of step. The run's state is the same before and after.

    Args:
        plain: the plain step with these parts.
        steps: this rank's micro-batches, step by step, at least one.
    Returns:
        The step, and all of `steps`.
    Raises:
        DeviceLostError: trying a fast step has left the device unusable; the next start takes the plain one.
        SaveError: the choice cannot be written.
    """
    world = parts.world
    machine, task = join_machines(world.gather_objects(machine_of(world.device))), task_of(parts)
    earlier = read_record(course.folder / FILE) if course.folder is not None else None
    why = why_plain(parts.config, world, course.num_images)
    fast: StepFn | None = None
    if why is not None:
        record = Record(chosen=PLAIN, why=why, machine=machine, task=task)
    else:
        batches = [own_batch(batch, world.device) for batch in next(steps)]
        steps = chain([batches], steps)
        question = Question(parts, candidates_of(parts), batches, course.rate, course.step, machine, task)
        known = world.broadcast_object(lambda: find_known(earlier, machine, task))
        record, fast = prove(question) if known is None else start_again(question, known)
        if world.is_main:
            log.info(describe(record, known=known is not None))
    if world.is_main and earlier is not None:
        tell_changes(earlier, record, deterministic=parts.config.deterministic)
    if course.folder is not None:
        save_json(course.folder / FILE, record)
    return fast or plain, steps


def candidates_of(parts: StepParts) -> list[Candidate]:
    """List the fast steps that a configuration can take, the most promising first."""
    return list_candidates(parts, partial(CudaCapture, parts.world.device), triton_kernels)


def list_candidates(
    parts: StepParts, make_capture: Callable[[], Capture], load_kernels: Callable[[], Kernels]
) -> list[Candidate]:
    """List the fast steps for a way of capturing and a form of the kernels."""

    def make_fused(parts: StepParts) -> StepFn:
        return make_fused_step(parts, make_capture(), load_kernels())

    return [
        Candidate("graph and fused kernels", make_fused, why_modules(parts)),
        Candidate("graph", lambda parts: FastStep(parts, make_capture())),
    ]


def own_batch(batch: Batch, device: torch.device) -> Batch:
    """Return a batch whose images are on the device and our own, so that it can be taken more than once."""
    return replace(batch, images=images_on_device(batch.images, device))


def find_known(earlier: Record | None, machine: dict[str, str], task: dict[str, str]) -> Record | None:
    """Return what was found out about this step here: by this run, or by another on this machine."""
    if earlier is not None and earlier.lasting and (earlier.machine, earlier.task) == (machine, task):
        return earlier
    return load_verdict(machine, task)


def join_machines(machines: list[dict[str, str]]) -> dict[str, str]:
    """Join the descriptions of all ranks' machines: each value that differs stands beside the others."""
    return {
        name: " and ".join(dict.fromkeys(machine.get(name, "none") for machine in machines))
        for name in machines[0]
    }


def describe(record: Record, *, known: bool) -> str:
    """Describe a choice that was proved, for the log."""
    runs = "the plain step runs" if record.chosen == PLAIN else f"the fast step runs ({record.chosen})"
    notes = [note for verdict in record.verdicts if verdict.name == record.chosen for note in verdict.notes]
    modules = f"; without a kernel of its own: {', '.join(notes)}" if notes else ""
    return f"{runs}: {record.why}{modules}{'; found out earlier on this machine' if known else ''}"


def tell_changes(earlier: Record, record: Record, *, deterministic: bool) -> None:
    """Log what computes a resumed run otherwise than before: the machine, the step."""
    if differing := differences(earlier, record.machine):
        doubt = "; with deterministic=true its bits may be others from here on" if deterministic else ""
        log.warning(f"this run goes on elsewhere: {', '.join(differing)}{doubt}")
    if earlier.chosen != record.chosen:
        names = [f"the {one.chosen} step" for one in (earlier, record)]
        log.warning(f"this run had {names[0]}, and goes on with {names[1]}: {record.why}")
