"""Doing the harm, and saying what was harmed and how the run had to answer."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from data_pipeline.common.errors import CorruptFileError
from data_pipeline.datasets.image_folder import load_image_folder
from scripts.soak.disk import Disk
from scripts.soak.launch import Launch, wait_until
from scripts.soak.plan import READ_AHEAD_STEPS, Fault, corruptible, steps_of
from scripts.soak.report import Hit
from train.checkpoints.format import MANIFEST, STATE
from train.checkpoints.load import verify_checkpoint

UNWRITTEN = "training goes on, and the checkpoints before it are untouched"
"""What a run says of a checkpoint that found no room."""

PASSED_OVER = "going on from the checkpoint before it"
"""What it says of one that is damaged."""


@dataclass(frozen=True)
class Damaged:
    """A checkpoint that was harmed.

    Args:
        step: its step.
        gone: whether all of it is gone, so that nobody can say a word about it.
        covered: whether verifying it finds the harm; a bit of a figure in the manifest decides nothing.
    """

    step: int
    gone: bool
    covered: bool


@dataclass
class Victim:
    """The run that the faults are for.

    Args:
        runs: the folder that `--out` names.
        data: the folder that `--data` names; a copy of the run's own.
        disk: where `runs` lies, if it can be filled.
        seed, epochs: of the run.
        corrupted: images that were corrupted: index, and the bytes that are there now.
        damaged: the checkpoint that the last fault damaged, until it is known what became of it.
    """

    runs: Path
    data: Path
    disk: Disk | None
    seed: int
    epochs: int
    corrupted: dict[int, bytes] = field(default_factory=dict)
    damaged: Damaged | None = None

    def image(self, index: int) -> Path:
        """The file of a training image."""
        return load_image_folder(self.data, "train").path_at(index)


def inject(fault: Fault, launch: Launch, victim: Victim) -> Hit | None:
    """Do it.

    Returns:
        What was done, with the problems that showed at once; None where there is nothing left to be hit.
    """
    _, at_step = launch.progress()
    hit = Hit(kind=fault.kind, at_step=at_step, ranks=launch.num_ranks, what="")
    generator = random.Random(fault.draw)
    if fault.kind == "terminate":
        launch.process.send_signal(signal.SIGTERM)
        hit.what = "torchrun"
    elif fault.kind == "kill_all":
        launch.kill()
        hit.what = "torchrun and all ranks"
    elif fault.kind == "kill_rank":
        return hit if kill_rank(hit, launch, generator) else None
    elif fault.kind == "fill_disk":
        return fill_disk(hit, launch, victim)
    elif fault.kind == "corrupt_image":
        return corrupt_image(hit, victim, generator)
    else:
        return damage_checkpoint(hit, launch, victim, generator)
    return hit


def kill_rank(hit: Hit, launch: Launch, generator: random.Random) -> bool:
    """SIGKILL to one of the ranks; False where they have just ended."""
    ranks = launch.ranks()
    if not ranks:
        return False
    place = generator.randrange(len(ranks))
    with suppress(ProcessLookupError):
        os.kill(ranks[place], signal.SIGKILL)
    hit.what += f"the {place + 1}. of {len(ranks)} ranks"
    return True


def fill_disk(hit: Hit, launch: Launch, victim: Victim) -> Hit:
    """Leave no room until a checkpoint could not be written; training has to go on meanwhile."""
    assert victim.disk is not None
    before, attempt = launch.said().count(UNWRITTEN), launch.progress()[0]
    hit.what = f"{victim.disk.fill() >> 20} MB"
    told = wait_until(lambda: launch.said().count(UNWRITTEN) > before or not launch.running, 90)
    kept = launch.running and launch.progress()[0] == attempt
    victim.disk.free()
    if not told:
        hit.problems.append("no checkpoint was said to be unwritten within 90 s")
    if not kept:
        hit.problems.append("training did not go on while the disk was full")
    hit.at_step = max(hit.at_step, launch.progress()[1])
    return hit


def corrupt_image(hit: Hit, victim: Victim, generator: random.Random) -> Hit | None:
    """Replace a training image that the run will read again, while it runs."""
    steps = steps_of(victim.seed, victim.epochs)
    soon = hit.at_step + READ_AHEAD_STEPS + 1
    candidates = [i for i in corruptible(victim.seed, victim.epochs) if i not in victim.corrupted]
    candidates = [i for i in candidates if (steps[:, i] > soon).any()]
    if not candidates:
        return None
    index = int(generator.choice(candidates))
    path = victim.image(index)
    how = generator.choice(["truncated", "emptied", "overwritten"])
    content = path.read_bytes()
    content = {"truncated": content[:300], "emptied": b"", "overwritten": generator.randbytes(len(content))}[
        how
    ]
    replace_file(path, content)
    victim.corrupted[index] = content
    hit.what = f"{path.parent.name}/{path.name} {how}"
    return hit


def replace_file(path: Path, content: bytes) -> None:
    """Other bytes under a name, at once: no reader sees half of them, and hard links keep theirs."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(content)
    temporary.replace(path)


def damage_checkpoint(hit: Hit, launch: Launch, victim: Victim, generator: random.Random) -> Hit | None:
    """Stop the ranks hard, and harm the checkpoint that they would go on from; an older whole one stays."""
    if not wait_until(lambda: len(_complete(victim.runs)) >= 2 or not launch.running, 60):
        return None
    there = _complete(victim.runs)
    whole = [folder for folder in there if _is_whole(folder)]
    hard = generator.random() < 0.5
    if hard:
        launch.kill()
        hit.what = "torchrun and all ranks killed; "
    elif kill_rank(hit, launch, generator):
        hit.what += " killed; "
        time.sleep(0.5)  # without that rank no step can be done; a save that is under way may end
    else:
        return None
    saved_since = [folder for folder in _complete(victim.runs) if folder not in there]
    newest, *older = [*saved_since, *(folder for folder in whole if folder.exists())]
    if not older:  # it would be the last one, from which nobody could recover
        hit.kind = "kill_all" if hard else "kill_rank"
        return hit
    path = newest
    if hit.kind == "flip_bit":
        path = newest / (MANIFEST if generator.random() < 0.25 else STATE)
        hit.what += flip_bit(path, generator)
    else:
        path = generator.choice([newest, newest / STATE, newest / MANIFEST])
        shutil.rmtree(newest) if path == newest else path.unlink()
        hit.what += f"{path.relative_to(newest.parent)} removed"
    covered = not _is_whole(newest)
    hit.what += "" if covered else ", which no hash covers"
    victim.damaged = Damaged(int(newest.name.removeprefix("step-")), not newest.exists(), covered)
    return hit


def flip_bit(path: Path, generator: random.Random) -> str:
    """Turn one bit of a file over; says which."""
    place, bit = generator.randrange(path.stat().st_size), generator.randrange(8)
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))
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


def answer(hit: Hit, launch: Launch, logs: str, victim: Victim) -> None:
    """After the run has gone on: did it say what it had to? Problems go to the hit.

    Args:
        launch: that did the first step after the fault.
        logs: what was said since then, and in the launch that was hit.
    """
    if hit.kind == "terminate" and "saved; go on with --resume auto" not in logs:
        hit.problems.append("the run was asked to stop, and did not say that it had saved")
    if victim.damaged is None:
        return
    damaged, victim.damaged = victim.damaged, None
    resumed = launch.resumed_at()
    if not resumed:
        hit.problems.append("the run did not say where it went on")
    elif resumed[-1] == damaged.step and damaged.covered:
        hit.problems.append(f"the run went on from the damaged checkpoint of step {damaged.step}")
    elif resumed[-1] < damaged.step and not damaged.gone:
        name = f"step-{damaged.step:08d}"
        if not any(name in line and PASSED_OVER in line for line in logs.splitlines()):
            hit.problems.append(f"the run passed over {name} without a word")
