"""`alexnet bench data`: images/s of our loader, torchvision's and DALI's own; our memory over many epochs."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import usable_cores
from data_pipeline.sharding.write import write_shards
from train.bench import harness, loaders
from train.bench.harness import Case, Ratios, Report, four_digits, log
from train.bench.images import write_bench_images, write_small_images
from train.bench.loaders import LoaderCase, Subject

BATCH, LARGE_BATCH, SMALL_BATCH = 64, 256, 128
SMALL_IMAGES, SMALL_CROP_PX = 4096, 56
MEMORY_EPOCHS = 20
SHARD_BYTES = 50_000_000
Key = tuple[str, int]
"""Name of a loader, and its number of cores."""
COLUMNS = {
    "name": ("loader", "<22"), "cores": ("cores", ">6"), "batch": ("batch", ">6"),
    "images_per_s": ("images/s", ">10"), "cpu_us": ("CPU us/image", ">14"),
}  # fmt: skip
NOTES = (
    "overlap: the step is a device that is busy (a sleep) for as long as a batch's decoding took",
    "feed_shards, feed_files: all but decoding; file_read: DALI reading the same files, and no more",
    f"cached, uncached: images of 64 pixels, decoded once or each time, to crops of {SMALL_CROP_PX}",
)


def make_subjects(folder: Path, shards: Path, small: Path, images: int, gpu: bool) -> dict[Key, Subject]:
    """The loaders to measure, by name and number of cores."""
    all_cores, large_batch = usable_cores(), min(LARGE_BATCH, images)
    cores = min(2, all_cores)
    of_small: dict[str, Any] = {"batch": SMALL_BATCH, "crop_px": SMALL_CROP_PX}
    shared = partial(Subject, cores=cores)
    subjects = [
        shared("dali", loaders.our_loader, folder),
        shared("shards", loaders.our_loader, shards),
        shared("torchvision", loaders.torchvision_loader, folder),
        shared("dali_reader", loaders.dali_reader, folder),
        shared("pillow", loaders.our_loader, folder, decoder="pillow"),
        shared("feed_shards", loaders.feed_loader, shards, batch=large_batch),
        shared("feed_files", loaders.feed_loader, folder, batch=large_batch),
        shared("file_read", loaders.file_read, folder, batch=large_batch),
        shared("cached", loaders.cached_loader, small, **of_small),
        shared("uncached", loaders.our_loader, small, **of_small),
        Subject("dali", loaders.our_loader, folder, 1),
        Subject("torchvision", loaders.torchvision_loader, folder, 1),
    ]
    if gpu:
        on_gpu = partial(Subject, cores=all_cores, batch=large_batch, gpu=True)
        subjects += [
            on_gpu("dali_gpu", loaders.our_loader, folder),
            on_gpu("dali_gpu_64", loaders.our_loader, folder, batch=BATCH),
            on_gpu("dali_gpu_deterministic", loaders.our_loader, folder, deterministic=True),
            on_gpu("dali_gpu_shards", loaders.our_loader, shards),
            on_gpu("dali_gpu_reader", loaders.dali_reader, folder),
            on_gpu("cached_gpu", partial(loaders.cached_loader, on_device=True), small, **of_small),
            Subject("torchvision", loaders.torchvision_loader, folder, all_cores),
        ]
    return {(subject.name, subject.cores): subject for subject in subjects}


def bench_data(
    folder: Path | None, *, images: int, num_rounds: int, batches: int, only: Sequence[str] = ()
) -> Report:
    """Measure the loaders; the options are those of the command. Shards are kept in `FOLDER-shards`.

    Raises:
        UserError: the folder holds something else, `images` is less than two batches, or a name is unknown.
    """
    import torch  # not in the processes of the loaders, whose memory is measured

    if images < 2 * BATCH:
        raise UserError(f"num_images must be at least {2 * BATCH}, not {images}")
    folder = write_bench_images(folder, images)
    shards, small = (folder.with_name(f"{folder.name}-{kind}") for kind in ("shards", "small"))
    subjects = choose_subjects(make_subjects(folder, shards, small, images, torch.cuda.is_available()), only)
    write_shards(folder, shards, shard_bytes=SHARD_BYTES)
    write_small_images(small, folder, SMALL_IMAGES)
    rates: defaultdict[Key, list[float]] = defaultdict(list)
    busy_us: defaultdict[Key, list[float]] = defaultdict(list)
    cores = min(2, usable_cores())
    with ExitStack() as stack:
        cases = {key: Case(stack, LoaderCase, subject) for key, subject in subjects.items()}
        for _ in harness.rounds(num_rounds):
            for key, case in cases.items():
                count = max(1, batches * BATCH // subjects[key].batch)
                count *= 10 if subjects[key].batch > BATCH else 1  # or a round would be too short
                rate, microseconds = case.request("measure", count, 0)
                rates[key].append(rate)
                busy_us[key].append(microseconds)
            if (key := ("dali", cores)) in cases:
                step_s = BATCH / rates[key][-1]  # as long as a batch's decoding took just now
                rates["overlap", cores].append(cases[key].request("measure", batches, step_s)[0])
    ratios, notes = make_ratios(rates, cores)
    sizes = [path.stat().st_size for path in folder.rglob("*.jpg")]
    return {
        "machine": harness.machine_name(),
        "num_images": len(sizes),
        "kilobytes": round(statistics.mean(sizes) / 1000, 1),
        "images_per_round": BATCH * batches,
        "rates": [
            {
                "name": name,
                "cores": n,
                "batch": subjects[key].batch if (key := (name, n)) in subjects else BATCH,
                **harness.rate(rates[name, n]),
                "cpu_us": four_digits(statistics.median(busy)) if (busy := busy_us[name, n]) else None,
            }
            for name, n in rates
        ],
        "ratios": ratios,
        "memory_mb": measure_memory(subjects, cores, images),
        "notes": [*NOTES, *notes],
    }


def choose_subjects(subjects: dict[Key, Subject], only: Sequence[str]) -> dict[Key, Subject]:
    """The subjects of some names; all for no name.

    Raises:
        UserError: there is no subject of a name on this machine.
    """
    known = {name for name, _ in subjects}
    if unknown := sorted(set(only) - known):
        raise UserError(f"no loader {unknown[0]!r} on this machine: there are {', '.join(sorted(known))}")
    return {key: subject for key, subject in subjects.items() if not only or key[0] in only}


def measure_memory(subjects: dict[Key, Subject], cores: int, images: int) -> list[float] | None:
    """Memory after each of many epochs, in MB; None where our loader is not among the subjects."""
    if (subject := subjects.get(("dali", cores))) is None:
        return None
    log.info(f"memory over {MEMORY_EPOCHS} epochs")
    with ExitStack() as stack:
        memory: list[float] = Case(stack, LoaderCase, subject).request(
            "memory_mb", MEMORY_EPOCHS, images // BATCH
        )
        return memory


def make_ratios(rates: dict[Key, list[float]], cores: int) -> tuple[Ratios, list[str]]:
    """Divide rates by rates; return the ratios and the notes on them."""
    every = usable_cores()
    pairs: dict[str, tuple[Key, Key]] = {
        "dali_vs_torchvision_2_cores": (("dali", 2), ("torchvision", 2)),
        "dali_vs_torchvision_1_core": (("dali", 1), ("torchvision", 1)),
        "own_order_vs_dali_reader": (("dali", cores), ("dali_reader", cores)),
        "shards_vs_files": (("shards", cores), ("dali", cores)),
        "overlap": (("overlap", cores), ("dali", cores)),
        "feed_files_vs_dali_read": (("feed_files", cores), ("file_read", cores)),
        "cached_vs_uncached": (("cached", cores), ("uncached", cores)),
        "dali_gpu_shards_vs_reader": (("dali_gpu_shards", every), ("dali_gpu_reader", every)),
        "dali_gpu_vs_reader": (("dali_gpu", every), ("dali_gpu_reader", every)),
        "dali_gpu_64_vs_256": (("dali_gpu_64", every), ("dali_gpu", every)),
        "dali_gpu_deterministic_vs_dali_gpu": (("dali_gpu_deterministic", every), ("dali_gpu", every)),
        "dali_gpu_vs_torchvision": (("dali_gpu", every), ("torchvision", every)),
    }
    found = {name: harness.median_ratio(rates.get(a), rates.get(b)) for name, (a, b) in pairs.items()}
    return harness.round_ratios(found, "not measured here")


def describe(report: Report) -> list[str]:
    """Return a line for each loader, the ratios, the memory and the notes."""
    memory = report["memory_mb"]
    rows = [[rate[name] for name in COLUMNS] for rate in report["rates"]]
    lines = [] if memory is None else [
        f"memory after epochs 2, 10, {len(memory)}: {memory[1]}, {memory[9]}, {memory[-1]} MB"
    ]  # fmt: skip
    return [
        f"{report['machine']}: {report['num_images']} JPEGs of {report['kilobytes']} kB on average",
        *harness.table_lines([*COLUMNS.values()], rows),
        *harness.ratio_lines(report["ratios"]),
        *lines,
        *report["notes"],
    ]
