"""`alexnet bench data`: how fast images become batches, ours against torchvision's and DALI's own loaders.

Everything is measured in one run and in turns, so that what else the machine does hits all alike; the figures
are medians, and the ratios medians of the ratios within a turn.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec
import torch

from data_pipeline.common.errors import UserError
from data_pipeline.sharding.write import write_shards
from train.bench.images import make_bench_folder, write_bench_images
from train.bench.subjects import BATCH
from train.bench.turns import four_digits, open_subject


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """What one subject did on so many cores.

    Args:
        images_per_s: the median of its rounds.
        rounds: images per second in each.
    """

    name: str
    cores: int
    images_per_s: float
    rounds: list[float]


class DataReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `bench_data` measured.

    Args:
        machine: processor, cores that may be used.
        num_images: how many there are.
        kilobytes: their mean size.
        images_per_round: how many each figure is measured over.
        rates: a row for each subject and number of cores.
        ratios: by name; None where this machine cannot measure it, and `notes` says why.
        memory_mb: resident memory of the loader's process after each of `MEMORY_EPOCHS` epochs.
        notes: what a reader must know.
    """

    machine: str
    num_images: int
    kilobytes: float
    images_per_round: int
    rates: list[Rate]
    ratios: dict[str, float | None]
    memory_mb: list[float]
    notes: list[str]


MEMORY_EPOCHS = 20
SHARD_BYTES = 50_000_000
_SETTLE_S = 0.5  # torch's workers finish what they read ahead, beside whoever is measured next
Key = tuple[str, int]


def bench_data(
    folder: Path | None = None,
    *,
    num_images: int = 2000,
    rounds: int = 5,
    batches_per_round: int = 15,
    tell: Callable[[str], None] = lambda text: None,
) -> DataReport:
    """Measure the loaders in turns.

    Args:
        folder: where the images are or are to be written, with their shards in `FOLDER-shards`; None for a
            folder kept among the temporary files.
        num_images: how many to write.
        rounds: turns.
        batches_per_round: batches of 64 in each.
        tell: called with a line on what is being done.
    Returns:
        The report.
    Raises:
        UserError: the folder holds something else, or fewer images than a batch.
    """
    if num_images < 2 * BATCH:
        raise UserError(f"num_images must be at least {2 * BATCH}, not {num_images}")
    folder = make_bench_folder() / str(num_images) if folder is None else folder
    tell(f"{num_images} images in {folder}")
    write_bench_images(folder, num_images)
    shards = folder.with_name(folder.name + "-shards")
    write_shards(folder, shards, shard_bytes=SHARD_BYTES)
    cores = min(2, len(os.sched_getaffinity(0)))
    subjects: list[Key] = [
        (name, cores) for name in ("dali", "shards", "torchvision", "dali_reader", "pillow")
    ]
    subjects += [] if cores == 1 else [("dali", 1), ("torchvision", 1)]
    subjects += [("dali_gpu", len(os.sched_getaffinity(0)))] if torch.cuda.is_available() else []
    measured: dict[Key, list[float]] = {}
    with ExitStack() as stack:
        ask = {
            (name, n): stack.enter_context(
                open_subject(
                    "train.bench.subjects", [name, str(shards if name == "shards" else folder), str(n)]
                )
            )
            for name, n in subjects
        }

        def measure(key: Key, step_s: float) -> float:
            rate: float = ask[key](batches_per_round, step_s)
            time.sleep(_SETTLE_S)
            return rate

        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            for key in subjects:
                measured.setdefault(key, []).append(measure(key, 0))
            step_s = BATCH / measured["dali", cores][-1]  # as long as a batch's decoding took just now
            measured.setdefault(("overlap", cores), []).append(measure(("dali", cores), step_s))
    tell(f"memory over {MEMORY_EPOCHS} epochs")
    with open_subject("train.bench.subjects", ["memory", str(folder), str(cores)]) as ask_memory:
        memory = [four_digits(value) for value in ask_memory(MEMORY_EPOCHS)]
    ratios, notes = _ratios(measured, cores)
    sizes = [path.stat().st_size for path in folder.rglob("*.jpg")]
    return DataReport(
        machine=f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        num_images=len(sizes),
        kilobytes=round(statistics.mean(sizes) / 1000, 1),
        images_per_round=BATCH * batches_per_round,
        rates=[
            Rate(name=name, cores=n, images_per_s=four_digits(statistics.median(values)),
                 rounds=[four_digits(value) for value in values])
            for (name, n), values in measured.items()
        ],
        ratios=ratios,
        memory_mb=memory,
        notes=notes,
    )  # fmt: skip


def describe(report: DataReport) -> str:
    """The report for people: a row for each loader, then the ratios and the notes."""
    lines = [f"{report.machine}: {report.num_images} JPEGs of {report.kilobytes} kB on average"]
    lines += [f"{r.name:<12} {r.cores} core(s) {r.images_per_s:>8.1f} images/s" for r in report.rates]
    lines += [
        f"{name:<30} " + ("not measured" if ratio is None else f"{ratio:.2f}")
        for name, ratio in report.ratios.items()
    ]
    memory = report.memory_mb
    lines.append(f"memory after epochs 2, 10, {len(memory)}: {memory[1]}, {memory[9]}, {memory[-1]} MB")
    return "\n".join([*lines, *report.notes])


def _ratios(measured: dict[Key, list[float]], cores: int) -> tuple[dict[str, float | None], list[str]]:
    pairs: dict[str, tuple[Key, Key]] = {
        "dali_vs_torchvision_2_cores": (("dali", 2), ("torchvision", 2)),
        "dali_vs_torchvision_1_core": (("dali", 1), ("torchvision", 1)),
        "own_order_vs_dali_reader": (("dali", cores), ("dali_reader", cores)),
        "shards_vs_files": (("shards", cores), ("dali", cores)),
        "overlap": (("overlap", cores), ("dali", cores)),
        "dali_gpu_vs_torchvision": (("dali_gpu", len(os.sched_getaffinity(0))), ("torchvision", cores)),
    }
    ratios: dict[str, float | None] = {}
    notes = ["overlap: the step is a device that is busy (a sleep) for as long as a batch's decoding took"]
    for name, (ours, theirs) in pairs.items():
        if ours in measured and theirs in measured:
            each = [a / b for a, b in zip(measured[ours], measured[theirs], strict=True)]
            ratios[name] = four_digits(statistics.median(each))
        else:
            ratios[name] = None
            notes.append(f"{name}: not measured here")
    return ratios, notes
