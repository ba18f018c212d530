"""Verdicts on the fast step on a card, kept in the user's cache and in the run folder.

A proof takes longer than a short run gains. So a machine makes it once for each key: the card, the versions
of what computes, our own source, and all that decides which kernels a step has, and on which shapes.
"""

from __future__ import annotations

import hashlib
import logging
import platform
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import msgspec
import torch

from data_pipeline.common.errors import CorruptFileError
from data_pipeline.common.files import read_small, user_cache, write_json
from data_pipeline.common.machine import installed_version
from data_pipeline.common.text import printable
from train.compile.choose import lrn_layers
from train.distributed.ddp import pass_sizes
from train.models.alexnet import AlexNet
from train.models.parts import head_of
from train.step import StepParts

log = logging.getLogger("train")

FILE = "step.json"
"""In the run folder."""
FOLDER = "steps"
"""In the user's cache."""
PLAIN = "plain"
"""Name of the plain step."""
DRIVER, PROCESSORS = Path("/proc/driver/nvidia/version"), Path("/proc/cpuinfo")


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on one fast step.

    Attributes:
        name: of the candidate.
        against: why it may not run, for people; None if it computes what the plain step computes.
        seconds: of a step; None where it was not timed.
        notes: what of the network has no kernel of its own in it, with the reasons.
        lasting: whether another try would end the same: lack of memory may be of the moment.
    """

    name: str
    against: str | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    lasting: bool = True


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """The step that runs, and why.

    Attributes:
        chosen: `plain`, or the name of a candidate.
        why: for people.
        machine: the card, and the versions of what computes.
        task: what else decides which kernels run, and on which shapes.
        plain_s: of a plain step; None where nothing was timed.
        verdicts: on the candidates; none where none was tried.
    """

    chosen: str
    why: str
    machine: dict[str, str]
    task: dict[str, str]
    plain_s: float | None = None
    verdicts: tuple[Verdict, ...] = ()

    @property
    def lasting(self) -> bool:
        """Whether the next run may rely on it."""
        return bool(self.verdicts) and all(verdict.lasting for verdict in self.verdicts)


def machine_of(device: torch.device) -> dict[str, str]:
    """Describe what computes: the card, the driver, and the versions of libraries and of our own source."""
    on_gpu, cudnn = device.type == "cuda", cast(Any, torch.backends.cudnn)
    capability = ".".join(map(str, torch.cuda.get_device_capability(device))) if on_gpu else "none"
    return {
        "card": torch.cuda.get_device_name(device) if on_gpu else processor_name(),
        "capability": capability,
        "driver": driver_version(),
        "torch": str(torch.__version__),
        "cudnn": str(cudnn.version()) if on_gpu else "none",
        "triton": installed_version("triton") or "none",
        "alexnet": installed_version("alexnet") or "none",
        "source": source_hash(),
    }


def driver_version(path: Path = DRIVER) -> str:
    """Return the version of NVIDIA's driver, `none` where there is none."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", path.read_text())
    except OSError:
        return "none"
    return found[1] if found else "unknown"


def processor_name(path: Path = PROCESSORS) -> str:
    """Return the processor's name, as far as the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return f"CPU {found[1] if found else platform.machine()}"


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Return a hash of the trainer's source: a changed kernel is another kernel."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def task_of(parts: StepParts) -> dict[str, str]:
    """Describe what decides which kernels a run's step has, and on which shapes."""
    config, world = parts.config, parts.world
    values = {
        "model": config.model,
        "layers": layers_hash(parts.network),
        "classes": head_of(parts.network)[1].get_parameter("bias").numel(),
        "crop_px": config.preprocessing.crop_px,
        "trivial": config.augment.trivial,
        "erase": config.augment.erase > 0,
        "mixes": config.augment.mixes,
        "optimizer": config.optimizer,
        "head_rate": config.head_rate,
        "precision": parts.precision.name,
        "ranks": world.world_size,
        "passes": pass_sizes(config, world),
        "parallel": config.parallel,
        "compress": config.compress,
        "lrn": config.lrn,
        "compile": config.compile,
        "deterministic": config.deterministic,
        "freeze": config.freeze,
        "average": parts.ema is not None,
        "spikes": config.spike_factor is not None,
        "label_smoothing": config.label_smoothing > 0,
        "class_weights": parts.class_weights is not None,
    }
    return {name: msgspec.json.encode(value).decode() for name, value in values.items()}


def layers_hash(network: AlexNet) -> str:
    """Return a hash of a network's layers, and of which are compiled; a benchmark may have replaced some."""
    compiled = [layer.fused for layer in lrn_layers(network)], network._compiled_call_impl is not None
    return hashlib.sha256(f"{network} {compiled}".encode()).hexdigest()[:16]


def load_verdict(machine: dict[str, str], task: dict[str, str]) -> Record | None:
    """Return what this machine found out earlier about the same step; None if nothing usable is kept."""
    path = _place(machine, task)
    record = read_record(path) if path is not None else None
    if record is not None and (record.machine, record.task) != (machine, task):
        log.warning(f"{path} is about another machine or step, and is passed over")
        return None
    return record


def save_verdict(record: Record) -> None:
    """Keep a lasting record for the next run on this machine; a log line where that is not possible."""
    path = _place(record.machine, record.task)
    if path is None or not record.lasting:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
    except OSError as error:
        log.warning(f"which step is right and faster cannot be kept for the next run: {error}")


def read_record(path: Path) -> Record | None:
    """Read a record; None if there is none, or one that cannot be read, which a log line says."""
    try:
        return msgspec.json.decode(read_small(path), type=Record)
    except FileNotFoundError:
        return None
    except (OSError, CorruptFileError, msgspec.DecodeError, UnicodeDecodeError) as error:
        log.warning(f"{printable(path)} cannot be read, and is passed over: {error}")
        return None


def _place(machine: dict[str, str], task: dict[str, str]) -> Path | None:
    key = hashlib.sha256(msgspec.json.encode([sorted(machine.items()), sorted(task.items())])).hexdigest()
    try:
        return user_cache() / FOLDER / f"{key[:32]}.json"
    except OSError:
        return None


def differences(earlier: Record, machine: dict[str, str]) -> list[str]:
    """List what computes otherwise than earlier, for people."""
    return [
        f"{name} was {old}, now {machine[name]}"
        for name, old in earlier.machine.items()
        if name in machine and machine[name] != old
    ]
