"""`alexnet bench startup`: how long a dataset of ImageNet's size takes to its first batch, and its memory.

The files are hard links to a few thousand JPEGs, so that they need no room and can be decoded all the same.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec

from data_pipeline.common.console import show_progress
from data_pipeline.datasets.index_cache import CACHE_FOLDER, SETTLE_NS
from data_pipeline.datasets.open import open_dataset
from data_pipeline.loader import Loader, make_backend
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.preprocessing import Preprocessing
from train.bench.images import make_bench_folder, write_bench_images
from train.bench.turns import answer_lines, four_digits, open_subject

NUM_CLASSES = 1000
NUM_SOURCES = 2000
BATCH = 128


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """One start in a fresh process.

    Args:
        seconds: from opening the data to the first batch, imports not counted.
        memory_mb: most resident memory of the process until then.
        num_images: how many the index holds.
    """

    seconds: float
    memory_mb: float
    num_images: int


class StartupReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `bench_startup` measured.

    Args:
        machine: processor, cores that may be used.
        first: a start that must list the files; `again`: one that finds the index kept.
        changed: a start after one file was added: the index must be made anew, and hold it.
    """

    machine: str
    first: Start
    again: Start
    changed: Start


def bench_startup(
    folder: Path | None = None,
    *,
    num_files: int = 1_281_167,
    tell: Callable[[str], None] = lambda text: None,
) -> StartupReport:
    """Measure the start on many files; each in a process of its own.

    Args:
        folder: where they are or are to be written; None for a folder among the temporary files.
        num_files: how many; ImageNet's training set has 1,281,167.
        tell: called with a line on what is being done.
    """
    folder = make_bench_folder() / f"links-{num_files}" if folder is None else folder
    _write_links(folder, num_files)
    shutil.rmtree(folder / CACHE_FOLDER, ignore_errors=True)
    starts: list[Start] = []
    for what in ("without an index", "with the index kept", "after a file was added"):
        tell(f"start {what}")
        if len(starts) == 2:
            source = next(os.scandir(folder / "train" / "class-0000"))
            os.link(source.path, folder / "train" / "class-0000" / "added.jpg")
        time.sleep(2 * SETTLE_NS / 1e9)  # an index made just after a change is kept, but not believed
        with open_subject("train.bench.startup", [str(folder)]) as ask:
            starts.append(msgspec.convert(ask("start"), Start))
    (folder / "train" / "class-0000" / "added.jpg").unlink()
    first, again, changed = starts
    return StartupReport(
        machine=f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        first=first,
        again=again,
        changed=changed,
    )


def describe(report: StartupReport) -> str:
    """The report for people."""
    rows = {"first": report.first, "again": report.again, "one file added": report.changed}
    return "\n".join(
        [report.machine]
        + [
            f"{name:<15} {start.num_images} images: first batch after {start.seconds} s, {start.memory_mb} MB"
            for name, start in rows.items()
        ]
    )


def _write_links(folder: Path, num_files: int) -> None:
    """`folder/train/class-0000/0000000.jpg` and so on; nothing if they are there."""
    marker = folder / "complete.txt"
    if marker.is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    sources = write_bench_images(make_bench_folder() / str(NUM_SOURCES), NUM_SOURCES)
    files = [str(path) for path in sorted(sources.rglob("*.jpg"))]
    classes = min(NUM_CLASSES, num_files // 2)
    for number in range(classes):
        (folder / "train" / f"class-{number:04d}").mkdir(parents=True)
    with show_progress("linking files", num_files) as progress:
        for number in range(num_files):
            os.link(
                files[number % len(files)], f"{folder}/train/class-{number % classes:04d}/{number:07d}.jpg"
            )
            if number % 10_000 == 9_999:
                progress.advance(10_000)
    marker.touch()


def _start(folder: Path) -> dict[str, object]:
    started = time.perf_counter()
    preprocessing = Preprocessing(crop_px=224)
    dataset = open_dataset(folder, "train")
    backend = make_backend("auto", device="cpu", preprocessing=preprocessing, max_batch=BATCH, num_threads=2)
    with closing(backend):
        stream = Loader(backend, preprocessing).train(dataset, Augment(), seed=0, global_batch=BATCH)
        with closing(stream):
            assert next(stream).valid.all()
    return {
        "seconds": four_digits(time.perf_counter() - started),
        "memory_mb": four_digits(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
        "num_images": len(dataset),
    }


if __name__ == "__main__":
    answer_lines(lambda: lambda words: _start(Path(sys.argv[1])))
