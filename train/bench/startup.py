"""`alexnet bench startup`: how long a dataset of ImageNet's size takes to its first batch, and its memory.

The files are hard links to a few thousand JPEGs, so that they need no room and can be decoded all the same.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import closing
from pathlib import Path

from data_pipeline.common.machine import resident_mb, usable_cores
from data_pipeline.datasets.index_cache import SETTLE_NS
from data_pipeline.datasets.kept_files import CACHE_FOLDER
from data_pipeline.datasets.open import open_dataset
from data_pipeline.decode.backend import make_backend
from data_pipeline.loader import Loader
from data_pipeline.loading.scan import with_table
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.preprocessing import Preprocessing
from train.bench.harness import Report, four_digits, log, machine_name, run_alone
from train.bench.images import FOLDER, link_bench_images

NUM_CLASSES = 1000
NUM_SOURCES = 2000
BATCH = 128
STARTS = {"first": "without an index", "again": "with the index kept", "changed": "after a file was added"}


def bench_startup(folder: Path | None, *, files: int) -> Report:
    """Measure the start on many files, in fresh processes; the options are those of the command.

    Returns:
        The starts: `first` must list the files, `again` finds the index kept, `changed` must make it anew,
        since a file was added.
    """
    folder = folder or FOLDER / f"links-{files}"
    classes = min(NUM_CLASSES, files // 2)
    names = (f"train/class-{number % classes:04d}/{number:07d}.jpg" for number in range(files))
    link_bench_images(folder, names, files, min(NUM_SOURCES, files // 20))
    shutil.rmtree(folder / CACHE_FOLDER, ignore_errors=True)
    report: Report = {"machine": machine_name()}
    added = folder / "train" / "class-0000" / "added.jpg"
    for name, text in STARTS.items():
        log.info(f"start {text}")
        if name == "changed":
            os.link(next(os.scandir(added.parent)), added)
        time.sleep(2 * SETTLE_NS / 1e9)  # an index that was made just after a change is made again
        report[name] = run_alone(measure_start, folder)
    added.unlink()
    return report


def measure_start(folder: Path) -> dict[str, float]:
    """Measure seconds from opening the data to the first batch, and this process's peak of memory."""
    started = time.perf_counter()
    preprocessing = Preprocessing(crop_px=224)
    dataset = with_table(open_dataset(folder, "train"), usable_cores())
    backend = make_backend("auto", device="cpu", preprocessing=preprocessing, max_batch=BATCH, num_threads=2)
    with closing(backend):
        stream = Loader(backend, preprocessing).train(dataset, Augment(), seed=0, global_batch=BATCH)
        with closing(stream):
            assert next(stream).valid.all()
    return {
        "seconds": four_digits(time.perf_counter() - started),
        "memory_mb": four_digits(resident_mb(peak=True)),
        "num_images": len(dataset),
    }


def describe(report: Report) -> list[str]:
    """Return a line for each start."""
    rows = {"first": report["first"], "again": report["again"], "one file added": report["changed"]}
    return [report["machine"]] + [
        f"{name:<15} {start['num_images']} images: first batch after {start['seconds']} s, "
        f"{start['memory_mb']} MB"
        for name, start in rows.items()
    ]
