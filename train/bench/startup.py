"""`alexnet bench startup`: seconds to the first batch of a dataset of ImageNet's size, and memory."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import ExitStack, closing
from pathlib import Path

from data_pipeline.common.machine import resident_mb, usable_cores
from data_pipeline.datasets.index_cache import SETTLE_NS
from data_pipeline.datasets.kept_files import CACHE_FOLDER
from train.bench.harness import Report, log, machine_name, make_report, run_alone
from train.bench.images import FOLDER, link_bench_images

STARTS = {"first": "without an index", "again": "with the index kept", "changed": "after a file was added"}


def bench_startup(folder: Path | None, *, files: int) -> Report:
    """Measure starts on many files, hard links that need no room; the options are those of the command."""
    folder = folder or FOLDER / f"links-{files}"
    classes = min(1000, files // 2)
    names = (f"train/class-{number % classes:04d}/{number:07d}.jpg" for number in range(files))
    link_bench_images(folder, names, files, min(2000, max(12, files // 500)))
    shutil.rmtree(folder / CACHE_FOLDER, ignore_errors=True)
    added = folder / "train" / "class-0000" / "added.jpg"
    added.unlink(missing_ok=True)  # by a run that was killed
    rows = []
    for name, text in STARTS.items():
        log.info(f"start {text}")
        if name == "changed":
            os.link(next(added.parent.iterdir()), added)
        time.sleep(2 * SETTLE_NS / 1e9)  # an index that was made just after a change is made again
        rows.append({"case": name, "start": text, **run_alone(measure_start, folder)})
    added.unlink()
    return make_report({"machine": machine_name()}, rows, {}, [])


def measure_start(folder: Path) -> dict[str, float]:
    """Measure seconds from opening the data to the first batch, and this process's peak of memory."""
    started = time.perf_counter()
    from train.bench.loaders import ENDLESS, Subject, open_samples, our_loader  # DALI takes its time

    subject = Subject("start", our_loader, folder, usable_cores(), batch=128, decoder="auto")
    with ExitStack() as stack:
        dataset = open_samples(subject)
        next(stack.enter_context(closing(our_loader(subject, stack, dataset=dataset)(ENDLESS))))
    seconds = time.perf_counter() - started
    return {"first_batch_s": seconds, "peak_memory_mb": resident_mb(peak=True), "num_images": len(dataset)}
