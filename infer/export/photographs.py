"""Images for the gate where there is no data set: windows of the two photographs that scikit-learn ships."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.dataset import Dataset

PHOTOGRAPHS = ("china.jpg", "flower.jpg")
SIDES_PX = (128, 192, 256, 320)
WINDOWS = 8
"""Of each side and photograph."""


@contextmanager
def photograph_windows() -> Iterator[Dataset]:
    """Give 64 windows of both photographs, as PNG files in a temporary folder: a dataset without labels.

    The gate's report names the folder, which says what they are.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        folder = resources.files("sklearn.datasets") / "images"
    except ModuleNotFoundError as error:
        raise UserError(
            "the gate's photographs come with scikit-learn, which is not installed: pip install "
            "'alexnet[train]', or name ImageNet with --data"
        ) from error
    with tempfile.TemporaryDirectory() as temporary:
        root, paths = Path(temporary) / f"{' and '.join(PHOTOGRAPHS)} of scikit-learn", []
        (root / "windows").mkdir(parents=True)
        for name in PHOTOGRAPHS:
            with resources.as_file(folder / name) as path, Image.open(path) as opened:
                photo = opened.convert("RGB")
            for side in SIDES_PX:
                for number in range(WINDOWS):
                    left = number * (photo.width - side) // (WINDOWS - 1)
                    top = number % 2 * (photo.height - side)
                    paths.append(f"{Path(name).stem}-{side}-{number}.png")
                    window = photo.crop((left, top, left + side, top + side))
                    window.save(root / "windows" / paths[-1], compress_level=1)
        yield Dataset(root, "windows", paths, np.zeros(len(paths), np.int64), classes=())
