"""Writes CIFAR as an ImageFolder, from its binary version: fixed records, no pickles."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import CorruptFileError
from data_pipeline.common.text import printable

SIDE_PX = 32

# Label bytes before the pixels (the last is the class), the file of class names, and the files of each split.
_FILES = {
    "cifar10": (
        1,
        "batches.meta.txt",
        {"train": [f"data_batch_{n}.bin" for n in range(1, 6)], "val": ["test_batch.bin"]},
    ),
    "cifar100": (2, "fine_label_names.txt", {"train": ["train.bin"], "val": ["test.bin"]}),
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
    num_label_bytes, names_file, splits = _FILES[kind]
    try:
        lines = (source / names_file).read_text("ascii").splitlines()
        classes = [line.strip() for line in lines if line.strip()]
        for name in classes:
            if not re.fullmatch(r"[a-z_]{1,40}", name):
                raise CorruptFileError(f"{printable(source / names_file)} holds {name!r}, which is no class")
        records = {
            split: np.concatenate([_read(source / name, num_label_bytes, len(classes)) for name in names])
            for split, names in splits.items()
        }
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{printable(source)} is not the binary version of {kind}: {error}") from error
    with show_progress(f"write {kind} as PNG", sum(map(len, records.values()))) as progress:
        for split, rows in records.items():
            for name in classes:
                (target / split / name).mkdir(parents=True)
            pixels_NHWC = rows[:, num_label_bytes:].reshape(-1, 3, SIDE_PX, SIDE_PX).transpose(0, 2, 3, 1)
            for number, label in enumerate(rows[:, num_label_bytes - 1].tolist()):
                image = Image.fromarray(np.ascontiguousarray(pixels_NHWC[number]))
                image.save(target / split / classes[label] / f"{number:05d}.png", "PNG", compress_level=1)
                progress.advance(1)


def _read(path: Path, num_label_bytes: int, num_classes: int) -> npt.NDArray[np.uint8]:
    """(N, label bytes + 3072) records."""
    data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    size = num_label_bytes + 3 * SIDE_PX * SIDE_PX
    if not len(data) or len(data) % size:
        raise CorruptFileError(
            f"{printable(path)} has {len(data)} bytes, which are no whole records of {size}"
        )
    records = data.reshape(-1, size)
    if records[:, num_label_bytes - 1].max() >= num_classes:
        raise CorruptFileError(f"{printable(path)} holds a class that has no name")
    return records
