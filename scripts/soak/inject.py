"""Injection of one fault, and the check that the run responded to it as it must."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_pipeline.common.errors import CorruptFileError
from data_pipeline.common.files import write_atomic
from scripts.soak.launch import Launch, RunSpec, filled, wait_until
from scripts.soak.plan import READ_AHEAD_STEPS, Fault, corruptible, steps_of
from scripts.soak.report import InjectedFault
from train.checkpoints.format import MANIFEST, STATE
from train.checkpoints.load import verify_checkpoint

UNWRITTEN = "training goes on, and the checkpoints before it are untouched"
"""Logged for a checkpoint that finds no room."""

PASSED_OVER = "going on from the checkpoint before it"
"""Logged for a damaged one."""


@dataclass(frozen=True)
class DamagedCheckpoint:
    """A checkpoint that was damaged.

    Attributes:
        step: its step.
        gone: whether all of it is gone, so that no log line can name it.
        detectable: whether verification finds the damage: all but a metric's digit beyond precision.
    """

    step: int
    gone: bool
    detectable: bool


@dataclass
class Damage:
    """The damage that the faults did to a run's files.

    Attributes:
        images: those that were corrupted: index -> their bytes now.
        checkpoint: the one that the last fault damaged, until `check_response` has looked at it.
    """

    images: dict[int, bytes] = field(default_factory=dict)
    checkpoint: DamagedCheckpoint | None = None


def inject(fault: Fault, launch: Launch, damage: Damage) -> InjectedFault | None:
    """Inject a fault.

    Returns:
        The injected fault, with the problems that showed at once; None where there was nothing left to hit.
    """
    hit = InjectedFault(kind=fault.kind, at_step=launch.progress()[1], ranks=launch.num_ranks, what="")
    generator = random.Random(fault.draw)
    was_hit = True
    if fault.kind == "terminate":
        launch.process.send_signal(signal.SIGTERM)
        hit.what = "torchrun"
    elif fault.kind == "kill_all":
        launch.kill()
        hit.what = "torchrun and all ranks"
    elif fault.kind == "kill_rank":
        was_hit = kill_rank(hit, launch, generator)
    elif fault.kind == "fill_disk":
        fill_disk(hit, launch)
    elif fault.kind == "corrupt_image":
        was_hit = corrupt_image(hit, launch.spec, damage, generator)
    else:
        was_hit = damage_checkpoint(hit, launch, damage, generator)
    return hit if was_hit else None


def kill_rank(hit: InjectedFault, launch: Launch, generator: random.Random) -> bool:
    """Kill one of the ranks by SIGKILL; False where they have just ended."""
    ranks = launch.ranks()
    if not ranks:
        return False
    place = generator.randrange(len(ranks))
    with suppress(ProcessLookupError):
        os.kill(ranks[place], signal.SIGKILL)
    hit.what += f"the {place + 1}. of {len(ranks)} ranks"
    return True


def fill_disk(hit: InjectedFault, launch: Launch) -> None:
    """Fill the disk until a checkpoint could not be written; training has to continue meanwhile."""
    before, attempt = launch.log_text().count(UNWRITTEN), launch.progress()[0]
    with filled(launch.spec.disk) as num_bytes:
        hit.what = f"{num_bytes >> 20} MB"
        logged = wait_until(lambda: launch.log_text().count(UNWRITTEN) > before or not launch.running, 90)
        continued = launch.running and launch.progress()[0] == attempt
    if not logged:
        hit.problems.append("no checkpoint was said to be unwritten within 90 s")
    if not continued:
        hit.problems.append("training did not go on while the disk was full")
    hit.at_step = max(hit.at_step, launch.progress()[1])


def corrupt_image(hit: InjectedFault, spec: RunSpec, damage: Damage, generator: random.Random) -> bool:
    """Replace a training image that the run will read again, while it runs; False where there is none."""
    steps = steps_of(spec.seed, spec.epochs)
    soon = hit.at_step + READ_AHEAD_STEPS + 1
    chosen = corruptible(spec.seed, spec.epochs)
    candidates = [i for i in chosen if i not in damage.images and (steps[:, i] > soon).any()]
    if not candidates:
        return False
    index = int(generator.choice(candidates))
    path = spec.image(index)
    how = generator.choice(["truncated", "emptied", "overwritten"])
    whole = path.read_bytes()
    contents = {"truncated": whole[:300], "emptied": b"", "overwritten": generator.randbytes(len(whole))}
    damage.images[index] = contents[how]
    write_atomic(path, contents[how])  # a new file: the other runs' hard links keep theirs
    hit.what = f"{path.parent.name}/{path.name} {how}"
    return True


def damage_checkpoint(hit: InjectedFault, launch: Launch, damage: Damage, generator: random.Random) -> bool:
    """Kill ranks, and damage the checkpoint that they would resume from; an older whole one stays."""
    runs = launch.spec.runs
    if not wait_until(lambda: len(_complete(runs)) >= 2 or not launch.running, 60):
        return False
    before = _complete(runs)
    whole = [folder for folder in before if _is_whole(folder)]
    hard = generator.random() < 0.5
    if hard:
        launch.kill()
        hit.what = "torchrun and all ranks killed; "
    elif kill_rank(hit, launch, generator):
        hit.what += " killed; "
        time.sleep(0.5)  # without that rank no step can be done; a save that is under way may end
    else:
        return False
    saved_since = [folder for folder in _complete(runs) if folder not in before]
    newest, *older = [*saved_since, *(folder for folder in whole if folder.exists())]
    if not older:  # it would be the last one, from which nobody could recover
        hit.kind = "kill_all" if hard else "kill_rank"
        return True
    path = newest
    if hit.kind == "flip_bit":
        path = newest / (MANIFEST if generator.random() < 0.25 else STATE)
        hit.what += flip_bit(path, generator)
    else:
        path = generator.choice([newest, newest / STATE, newest / MANIFEST])
        shutil.rmtree(newest) if path == newest else path.unlink()
        hit.what += f"{path.relative_to(newest.parent)} removed"
    detectable = not _is_whole(newest)
    hit.what += "" if detectable else ", which changes no value"
    step = int(newest.name.removeprefix("step-"))
    damage.checkpoint = DamagedCheckpoint(step, gone=not newest.exists(), detectable=detectable)
    return True


def flip_bit(path: Path, generator: random.Random) -> str:
    """Flip one bit of a file. Returns which, in words."""
    place, bit = generator.randrange(path.stat().st_size), generator.randrange(8)
    content = np.memmap(path, dtype=np.uint8, mode="r+")
    content[place] ^= 1 << bit
    content.flush()
    return f"bit {bit} of byte {place} of {path.parent.name}/{path.name}"


def _complete(runs: Path) -> list[Path]:
    """Checkpoints with both their files, newest first."""
    found = sorted(runs.glob("*/checkpoints/step-*"), reverse=True)
    return [folder for folder in found if (folder / MANIFEST).exists() and (folder / STATE).exists()]


def _is_whole(folder: Path) -> bool:
    """Whether a checkpoint holds what its manifest says."""
    try:
        verify_checkpoint(folder)
    except CorruptFileError:
        return False
    return True


def check_response(hit: InjectedFault, launch: Launch, logs: str, damage: Damage) -> None:
    """Check that the run logged what it must after a fault, once it is past it. Adds problems to the hit.

    Args:
        launch: the launch that did the first step after the fault.
        logs: its log, and that of the launch that was hit.
    """
    if hit.kind == "terminate" and "saved; go on with --resume auto" not in logs:
        hit.problems.append("the run was asked to stop, and did not say that it had saved")
    damaged, damage.checkpoint = damage.checkpoint, None
    if damaged is None:
        return
    resumed = [int(step) for step in re.findall(r"resuming at step (\d+)", launch.log_text())]
    if not resumed:
        hit.problems.append("the run did not say where it went on")
    elif resumed[-1] == damaged.step and damaged.detectable:
        hit.problems.append(f"the run went on from the damaged checkpoint of step {damaged.step}")
    elif resumed[-1] < damaged.step and not damaged.gone:
        name = f"step-{damaged.step:08d}"
        if not any(name in line and PASSED_OVER in line for line in logs.splitlines()):
            hit.problems.append(f"the run passed over {name} without a word")
