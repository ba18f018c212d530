"""What `train.bench.data` measures: each subject turns the benchmark's images into training batches, once.

A subject runs in a process of its own, pinned to its cores, and does one round each time it is told to, so
that the subjects can take turns. The command line of this file is for that process only.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from data_pipeline.datasets.open import open_dataset
from data_pipeline.loader import Loader, make_backend
from data_pipeline.loading.readers import ReaderPool
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.preprocessing import Preprocessing
from train.bench.turns import answer_lines
from train.config.load import READERS

BATCH = 64
CROP_PX = 224
MicroBatchPlan = Callable[[int], Iterator[int]]
"""Makes so many batches and yields the number of images in each."""


def ours(
    backend_name: Literal["dali", "pillow"],
    folder: Path,
    num_cores: int,
    *,
    device: Literal["cpu", "gpu"] = "cpu",
) -> MicroBatchPlan:
    """This project's loader, on a folder of files or of shards; as in training, processes read for a GPU."""
    preprocessing = Preprocessing(crop_px=CROP_PX)
    dataset = open_dataset(folder, "train", quarantine=False)
    backend = make_backend(
        backend_name, device=device, preprocessing=preprocessing, max_batch=BATCH, num_threads=num_cores
    )
    readers = ReaderPool([dataset], READERS) if device == "gpu" else None
    loader = Loader(backend, preprocessing, readers=readers)
    done = 0

    def batches(count: int) -> Iterator[int]:
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


def torchvision_loader(folder: Path, num_cores: int) -> MicroBatchPlan:
    """torch's DataLoader with torchvision's v2 transforms, a worker for each core, uint8 out."""
    import torch
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    steps = [v2.RandomResizedCrop(CROP_PX, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    images = ImageFolder(str(folder / "train"), transform=v2.Compose(steps))
    torch.set_num_threads(1)
    loader: Any = torch.utils.data.DataLoader(
        images, BATCH, shuffle=True, num_workers=num_cores, drop_last=True, persistent_workers=True
    )

    def batches(count: int) -> Iterator[int]:
        while count:
            for pixels, _labels in loader:
                yield len(pixels)
                count -= 1
                if not count:
                    return

    return batches


def dali_reader(folder: Path, num_cores: int) -> MicroBatchPlan:
    """DALI as its documentation has it: its file reader, its random crop, its own prefetching."""
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

    def batches(count: int) -> Iterator[int]:
        for _ in range(count):
            images, _labels = pipeline.run()
            yield len(
                np.array(images.as_array())
            )  # a copy: a batch outlives the next run, as with every loader

    return batches


def make_subject(name: str, folder: Path, num_cores: int) -> MicroBatchPlan:
    """A subject by its name in the report."""
    if name in ("dali", "shards"):
        return ours("dali", folder, num_cores)
    if name == "dali_gpu":
        return ours("dali", folder, num_cores, device="gpu")
    if name == "pillow":
        return ours("pillow", folder, num_cores)
    return {"torchvision": torchvision_loader, "dali_reader": dali_reader}[name](folder, num_cores)


def memory_over_epochs(folder: Path, num_cores: int, num_epochs: int) -> list[float]:
    """Resident memory after each epoch over all images, in one loader, in MB."""
    batches_per_epoch = len(open_dataset(folder, "train", quarantine=False)) // BATCH
    memory = []
    for number, _ in enumerate(ours("dali", folder, num_cores)(num_epochs * batches_per_epoch), start=1):
        if number % batches_per_epoch == 0:
            memory.append(_resident_mb())
    return memory


def _resident_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(float(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1000


def measure(round_: MicroBatchPlan, num_batches: int, step_s: float) -> float:
    """Images per second once batches flow: from the first batch's arrival to that of the last.

    Args:
        num_batches: that are counted; one more is made, the first.
        step_s: for so long a device is busy after each batch.
    """
    images = 0
    batches = round_(num_batches + 1)
    next(batches)
    started = arrived = time.perf_counter()
    for count in _after_steps(batches, step_s):
        images += count
        arrived = time.perf_counter()
    return images / (arrived - started)


def _after_steps(batches: Iterator[int], step_s: float) -> Iterator[int]:
    while True:
        if step_s:
            time.sleep(step_s)
        try:
            yield next(batches)
        except StopIteration:
            return


def serve(name: str, folder: Path, num_cores: int) -> None:
    """Answer each line `batches step_s` with images per second, or `epochs` with memory in MB after each."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])

    def make() -> Callable[[list[str]], object]:
        if name == "memory":
            return lambda words: memory_over_epochs(folder, num_cores, int(words[0]))
        round_ = make_subject(name, folder, num_cores)
        measure(round_, 2, 0)
        return lambda words: measure(round_, int(words[0]), float(words[1]))

    answer_lines(make)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
