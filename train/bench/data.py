"""`alexnet bench data`: images/s of our loader, torchvision's and DALI's own; our memory over many epochs."""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import usable_cores
from data_pipeline.datasets.open import open_dataset
from data_pipeline.loader import Loader, make_backend
from data_pipeline.loading.readers import ReaderPool
from data_pipeline.sharding.write import write_shards
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.preprocessing import Preprocessing
from train.bench import harness
from train.bench.harness import Case, Ratios, Report, log
from train.bench.images import write_bench_images
from train.config.schema import READERS

BATCH = 64
CROP_PX = 224
MEMORY_EPOCHS = 20
SHARD_BYTES = 50_000_000
SETTLE_S = 0.5
Key = tuple[str, int]
"""Name of a loader, and its number of cores."""
MakeBatches = Callable[[int], Generator[int, None, None]]
"""Makes so many batches and yields the number of images in each."""


class LoaderCase:
    """A loader on so many cores, turning the benchmark's images into training batches.

    Args:
        name: `torchvision`, `dali_reader`, or one of ours: `dali`, `shards`, `dali_gpu`, `pillow`.
    """

    def __init__(self, stack: ExitStack, name: str, folder: Path, num_cores: int) -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])
        if name == "torchvision":
            self._batches = torchvision_loader(folder, num_cores)
        elif name == "dali_reader":
            self._batches = dali_reader(folder, num_cores)
        else:
            self._batches = our_loader(folder, num_cores, name)
        self.images_per_s(2, 0)

    def images_per_s(self, num_batches: int, step_s: float) -> float:
        """Run `time_batches`, and let torch's workers finish what they read ahead."""
        rate = time_batches(self._batches, num_batches, step_s)
        time.sleep(SETTLE_S)
        return rate

    def memory_mb(self, num_epochs: int, batches_per_epoch: int) -> list[float]:
        """Return the resident memory of this process after each epoch over all images."""
        memory = []
        for number, _ in enumerate(self._batches(num_epochs * batches_per_epoch), start=1):
            if number % batches_per_epoch == 0:
                status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
                kilobytes = next(line.split()[1] for line in status if line.startswith("VmRSS"))
                memory.append(harness.four_digits(float(kilobytes) / 1000))
        return memory


def time_batches(make_batches: MakeBatches, num_batches: int, step_s: float) -> float:
    """Return images per second, timed from the first batch's arrival to that of the last.

    Args:
        num_batches: that are counted; one more is made, the first.
        step_s: for so long a device is busy after each batch.
    """
    images = 0
    with closing(make_batches(num_batches + 1)) as batches:
        next(batches)
        started = time.perf_counter()
        for _ in range(num_batches):
            if step_s:
                time.sleep(step_s)
            images += next(batches)
        return images / (time.perf_counter() - started)


def our_loader(folder: Path, num_cores: int, name: str) -> MakeBatches:
    """Open this project's loader on files or shards; as in training, processes read for a GPU."""
    gpu = name == "dali_gpu"
    preprocessing = Preprocessing(crop_px=CROP_PX)
    dataset = open_dataset(folder, "train", quarantine=False)
    backend = make_backend(
        "pillow" if name == "pillow" else "dali", device="gpu" if gpu else "cpu",
        preprocessing=preprocessing, max_batch=BATCH, num_threads=num_cores,
    )  # fmt: skip
    loader = Loader(backend, preprocessing, readers=ReaderPool([dataset], READERS) if gpu else None)
    done = 0

    def batches(count: int) -> Generator[int, None, None]:
        nonlocal done
        stream = loader.train(
            dataset, Augment(), seed=0, global_batch=BATCH, start_step=done, num_steps=count
        )
        done += count
        with closing(stream):
            for batch in stream:
                assert batch.valid.all()
                yield len(batch)

    return batches


def torchvision_loader(folder: Path, num_cores: int) -> MakeBatches:
    """Open torch's DataLoader with torchvision's v2 transforms, a worker for each core, uint8 out."""
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(CROP_PX, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    images = ImageFolder(str(folder / "train"), transform=v2.Compose(steps))
    torch.set_num_threads(1)
    loader: Any = torch.utils.data.DataLoader(
        images, BATCH, shuffle=True, num_workers=num_cores, drop_last=True, persistent_workers=True
    )

    def batches(count: int) -> Generator[int, None, None]:
        for pixels, _labels in islice(chain.from_iterable(repeat(loader)), count):
            yield len(pixels)

    return batches


def dali_reader(folder: Path, num_cores: int) -> MakeBatches:
    """Open DALI as its documentation has it: its file reader, its random crop, its own prefetching."""
    import numpy as np
    import nvidia.dali

    dali: Any = nvidia.dali
    fn, types = dali.fn, dali.types
    pipeline = dali.Pipeline(batch_size=BATCH, num_threads=num_cores, device_id=None, seed=1)
    with pipeline:
        encoded, labels = fn.readers.file(file_root=str(folder / "train"), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(encoded, output_type=types.RGB)
        images = fn.resize(images, size=[CROP_PX, CROP_PX], interp_type=types.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(fn.flip(images, horizontal=fn.random.coin_flip()), labels)
    pipeline.build()

    def batches(count: int) -> Generator[int, None, None]:
        for _ in range(count):
            images, _labels = pipeline.run()
            # Copied, since a batch must outlive the next run, as every loader's does.
            yield len(np.array(images.as_array()))

    return batches


def bench_data(folder: Path | None, *, images: int, num_rounds: int, batches: int) -> Report:
    """Measure the loaders; the options are those of the command. Shards are kept in `FOLDER-shards`.

    Raises:
        UserError: the folder holds something else, or `images` is less than two batches.
    """
    import torch  # not in the processes of the loaders, whose memory is measured

    if images < 2 * BATCH:
        raise UserError(f"num_images must be at least {2 * BATCH}, not {images}")
    folder = write_bench_images(folder, images)
    shards = folder.with_name(folder.name + "-shards")
    write_shards(folder, shards, shard_bytes=SHARD_BYTES)
    cores = min(2, usable_cores())
    names = [(name, cores) for name in ("dali", "shards", "torchvision", "dali_reader", "pillow")]
    names += [] if cores == 1 else [("dali", 1), ("torchvision", 1)]
    names += [("dali_gpu", usable_cores())] if torch.cuda.is_available() else []
    rates: defaultdict[Key, list[float]] = defaultdict(list)
    with ExitStack() as stack:
        cases = {
            (name, n): Case(stack, LoaderCase, name, shards if name == "shards" else folder, n)
            for name, n in names
        }
        for _ in harness.rounds(num_rounds):
            for key, case in cases.items():
                rates[key].append(case.request("images_per_s", batches, 0))
            step_s = BATCH / rates["dali", cores][-1]  # as long as a batch's decoding took just now
            rates["overlap", cores].append(cases["dali", cores].request("images_per_s", batches, step_s))
    log.info(f"memory over {MEMORY_EPOCHS} epochs")
    with ExitStack() as stack:
        case = Case(stack, LoaderCase, "dali", folder, cores)
        memory = case.request("memory_mb", MEMORY_EPOCHS, images // BATCH)
    ratios, notes = make_ratios(rates, cores)
    sizes = [path.stat().st_size for path in folder.rglob("*.jpg")]
    return {
        "machine": harness.machine_name(),
        "num_images": len(sizes),
        "kilobytes": round(statistics.mean(sizes) / 1000, 1),
        "images_per_round": BATCH * batches,
        "rates": [{"name": name, "cores": n, **harness.rate(rates[name, n])} for name, n in rates],
        "ratios": ratios,
        "memory_mb": memory,
        "notes": notes,
    }


def make_ratios(rates: dict[Key, list[float]], cores: int) -> tuple[Ratios, list[str]]:
    """Divide rates by rates; return the ratios and the notes on them."""
    pairs: dict[str, tuple[Key, Key]] = {
        "dali_vs_torchvision_2_cores": (("dali", 2), ("torchvision", 2)),
        "dali_vs_torchvision_1_core": (("dali", 1), ("torchvision", 1)),
        "own_order_vs_dali_reader": (("dali", cores), ("dali_reader", cores)),
        "shards_vs_files": (("shards", cores), ("dali", cores)),
        "overlap": (("overlap", cores), ("dali", cores)),
        "dali_gpu_vs_torchvision": (("dali_gpu", usable_cores()), ("torchvision", cores)),
    }
    found = {name: harness.median_ratio(rates.get(a), rates.get(b)) for name, (a, b) in pairs.items()}
    ratios, notes = harness.round_ratios(found, "not measured here")
    overlap = "overlap: the step is a device that is busy (a sleep) for as long as a batch's decoding took"
    return ratios, [overlap, *notes]


def describe(report: Report) -> list[str]:
    """Return a line for each loader, the ratios, the memory and the notes."""
    memory = report["memory_mb"]
    return [
        f"{report['machine']}: {report['num_images']} JPEGs of {report['kilobytes']} kB on average",
        *("{name:<12} {cores} core(s) {images_per_s:>8.1f} images/s".format(**r) for r in report["rates"]),
        *harness.ratio_lines(report["ratios"]),
        f"memory after epochs 2, 10, {len(memory)}: {memory[1]}, {memory[9]}, {memory[-1]} MB",
        *report["notes"],
    ]
