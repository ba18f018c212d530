"""CIFAR as an ImageFolder, from its binary version: fixed records, nothing to unpickle."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipeline.common.console import Progress, show_progress
from data_pipeline.common.errors import CorruptFileError
from data_pipeline.common.text import printable

SIDE_PX = 32
_PIXEL_BYTES = 3 * SIDE_PX * SIDE_PX


@dataclass(frozen=True)
class _Files:
    """What the archive holds: label bytes before the pixels (the last is the class), and the files."""

    num_label_bytes: int
    names: str
    train: tuple[str, ...]
    val: tuple[str, ...]


_FILES = {
    "cifar10": _Files(
        1, "batches.meta.txt", tuple(f"data_batch_{n}.bin" for n in range(1, 6)), ("test_batch.bin",)
    ),
    "cifar100": _Files(2, "fine_label_names.txt", ("train.bin",), ("test.bin",)),
}


def write_cifar(source: Path, target: Path, kind: Literal["cifar10", "cifar100"]) -> None:
    """Write `train/<class>/<number>.png` and `val/...`, numbered in the archive's order.

    Args:
        source: the unpacked folder of the binary version.
        target: the data folder to make.
        kind: which of the two.
    Raises:
        CorruptFileError: a file that is missing, or is not of whole records.
    Source: the author's page, https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
    """
    files = _FILES[kind]
    try:
        classes = [line.strip() for line in (source / files.names).read_text("ascii").splitlines()]
        classes = [name for name in classes if name]
        for name in classes:
            if not re.fullmatch(r"[a-z_]{1,40}", name):
                raise CorruptFileError(f"{printable(source / files.names)} holds {name!r}, which is no class")
        splits = {"train": files.train, "val": files.val}
        loaded = {
            split: [_read(source / name, files.num_label_bytes, len(classes)) for name in names]
            for split, names in splits.items()
        }
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{printable(source)} is not the binary version of {kind}: {error}") from error
    total = sum(len(records) for parts in loaded.values() for records in parts)
    with show_progress(f"write {kind} as PNG", total) as progress:
        for split, parts in loaded.items():
            for name in classes:
                (target / split / name).mkdir(parents=True)
            _write(np.concatenate(parts), target / split, classes, files.num_label_bytes, progress)


def _read(path: Path, num_label_bytes: int, num_classes: int) -> npt.NDArray[np.uint8]:
    """(N, label bytes + 3072) records."""
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    size = num_label_bytes + _PIXEL_BYTES
    if not len(data) or len(data) % size:
        raise CorruptFileError(
            f"{printable(path)} has {len(data)} bytes, which are no whole records of {size}"
        )
    records = data.reshape(-1, size)
    if records[:, num_label_bytes - 1].max() >= num_classes:
        raise CorruptFileError(f"{printable(path)} holds a class that has no name")
    return records


def _write(
    records: npt.NDArray[np.uint8], folder: Path, classes: list[str], num_label_bytes: int, progress: Progress
) -> None:
    pixels_NHWC = records[:, num_label_bytes:].reshape(-1, 3, SIDE_PX, SIDE_PX).transpose(0, 2, 3, 1)

    def write(number: int) -> None:
        image = Image.fromarray(np.ascontiguousarray(pixels_NHWC[number]))
        name = classes[int(records[number, num_label_bytes - 1])]
        image.save(folder / name / f"{number:05d}.png", "PNG", compress_level=1)

    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(write, range(len(records))):
            progress.advance(1)
