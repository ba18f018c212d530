"""`alexnet bench data`: images/s of our loader, torchvision's and DALI's own; our memory over many epochs."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import usable_cores
from data_pipeline.sharding.write import write_shards
from train.bench import loaders
from train.bench.harness import Bench, Report, log, machine_name, median_ratio
from train.bench.images import write_bench_images
from train.bench.loaders import BATCH, LoaderCase, Subject

MEMORY_EPOCHS = 20
RATIOS = {  # images/s of one case over another's
    "dali_vs_torchvision_2_cores": ("dali", "torchvision"),
    "dali_vs_torchvision_1_core": ("dali_1_core", "torchvision_1_core"),
    "own_order_vs_dali_reader": ("dali", "dali_reader"),
    "shards_vs_files": ("shards", "dali"),
    "cached_vs_uncached": ("cached", "uncached"),
    "dali_gpu_shards_vs_reader": ("dali_gpu_shards", "dali_gpu_reader"),
    "dali_gpu_vs_reader": ("dali_gpu", "dali_gpu_reader"),
    "dali_gpu_64_vs_256": ("dali_gpu_64", "dali_gpu"),
    "dali_gpu_deterministic_vs_dali_gpu": ("dali_gpu_deterministic", "dali_gpu"),
    "dali_gpu_vs_torchvision": ("dali_gpu", "torchvision_all_cores"),
}
NOTES = (
    "overlap: the step is a device that is busy (a sleep) for as long as a batch's decoding took",
    "cached, uncached: images of 64 pixels, decoded once or each time, to crops of 56",
)


def make_subjects(folder: Path, shards: Path, small: Path, images: int, gpu: bool) -> list[Subject]:
    """Return the loaders to measure on this machine, each by a name of its own."""
    every, large, two = usable_cores(), min(256, images), min(2, usable_cores())
    on_small = partial(Subject, folder=small, batch=128, crop_px=56)
    on_gpu = partial(Subject, cores=every, batch=large, gpu=True)
    subjects = [
        Subject("dali", loaders.our_loader, folder, two, overlaps=True),
        Subject("shards", loaders.our_loader, shards, two),
        Subject("torchvision", loaders.torchvision_loader, folder, two),
        Subject("dali_reader", loaders.dali_reader, folder, two),
        Subject("pillow", loaders.our_loader, folder, two, decoder="pillow"),
        on_small("cached", loaders.cached_loader, cores=two),
        on_small("uncached", loaders.our_loader, cores=two),
        Subject("dali_1_core", loaders.our_loader, folder, 1),
        Subject("torchvision_1_core", loaders.torchvision_loader, folder, 1),
    ]
    return subjects if not gpu else [
        *subjects,
        on_gpu("dali_gpu", loaders.our_loader, folder),
        on_gpu("dali_gpu_64", loaders.our_loader, folder, batch=BATCH),
        on_gpu("dali_gpu_deterministic", loaders.our_loader, folder, deterministic=True),
        on_gpu("dali_gpu_shards", loaders.our_loader, shards),
        on_gpu("dali_gpu_reader", loaders.dali_reader, folder),
        on_small("cached_gpu", partial(loaders.cached_loader, on_device=True), cores=every, gpu=True),
        Subject("torchvision_all_cores", loaders.torchvision_loader, folder, every),
    ]  # fmt: skip


def bench_data(
    folder: Path | None, *, images: int, num_rounds: int, batches: int, only: Sequence[str] = ()
) -> Report:
    """Measure the loaders; the options are those of the command. Shards are kept in `FOLDER-shards`.

    Raises: as `fill_folder`, and UserError for a name that no loader has on this machine.
    """
    folder = write_bench_images(folder, images)
    shards, small = (folder.with_name(f"{folder.name}-{kind}") for kind in ("shards", "small"))
    subjects = make_subjects(folder, shards, small, images, torch.cuda.is_available())
    # `dali` is a name of `dali_1_core`, too
    names = {case.name: {case.name, re.sub("_(1|all)_cores?$", "", case.name)} for case in subjects}
    if unknown := sorted({*only}.difference(*names.values())):
        raise UserError(f"no loader {unknown[0]!r} on this machine: there are {', '.join(sorted(names))}")
    subjects = [subject for subject in subjects if not only or names[subject.name] & {*only}]
    write_shards(folder, shards, shard_bytes=50_000_000)
    if any(subject.folder == small for subject in subjects):
        write_bench_images(small, 4096, sides=(64, 64), spread=0.0)
    bench = Bench()
    with ExitStack() as stack:
        bench.start(stack, {subject.name: (LoaderCase, subject) for subject in subjects})
        bench.facts |= {case.name: {"cores": case.cores, "batch": case.batch} for case in subjects}
        bench.measure(num_rounds, "measure", batches)
        if "dali" in bench.cases:
            log.info(f"memory over {MEMORY_EPOCHS} epochs")
        bench.note("memory", MEMORY_EPOCHS, images, only=["dali"])
    settings = {
        "machine": machine_name(),
        "num_images": images,
        "jpeg_kb": statistics.mean(path.stat().st_size / 1000 for path in folder.rglob("*.jpg")),
        "images_per_round": BATCH * batches,
        "memory_mb": bench.facts["dali"].pop("memory_mb", None),
    }
    ratios = {name: bench.ratio("images_per_s", *pair) for name, pair in RATIOS.items()}
    if usable_cores() < 2:
        ratios["dali_vs_torchvision_2_cores"] = None
    ours = bench.rounds["dali"]
    ratios["overlap"] = median_ratio(ours.get("overlap_images_per_s"), ours.get("images_per_s"))
    return bench.report(settings, [subject.name for subject in subjects], ratios, NOTES)
