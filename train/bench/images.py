"""The JPEGs of benchmarks, of ImageNet's size, spectrum and edges, in folders that keep them between runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable
from data_pipeline.datasets.demo import read_photographs
from train.bench.harness import log

FOLDER = Path(tempfile.gettempdir()) / "alexnet-bench-photographs"  # unless the user names one


def write_bench_images(
    root: Path | None, count: int, sides: tuple[int, int] = (500, 375), spread: float = 0.1
) -> Path:
    """Write `root/train/<class>/<number>.jpg`, alike wherever Pillow is the same; return `root`."""
    root = root or FOLDER / str(count)
    log.info(f"{count} images in {root}")
    names = (f"train/class-{number % 10}/{number:05d}.jpg" for number in range(count))
    content = f"{count} parts of photographs, {sides[0]} x {sides[1]} pixels"
    fill_folder(root, content, names, count, partial(write_photograph, sides=sides, spread=spread))
    return root


def link_bench_images(root: Path, names: Iterable[str], total: int, num_sources: int) -> None:
    """Link `total` names below `root` to the benchmark's images. Raises: as `fill_folder`."""
    photos = cache(lambda: sorted(write_bench_images(None, num_sources).rglob("*.jpg")))
    content = f"{total} links to {num_sources} parts of photographs"
    fill_folder(root, content, names, total, lambda n, target: os.link(photos()[n % num_sources], target))


def fill_folder(
    root: Path, content: str, names: Iterable[str], total: int, write: Callable[[int, Path], object]
) -> None:
    """Write the files that a folder lacks, so that a run goes on after one that was killed.

    `content` says in words what the folder holds, and marks it as a benchmark's; `write` makes the file of a
    number at a path, whole or not at all. Raises UserError where the folder holds something else.
    """
    marker, complete = root / "bench-images.txt", root / "complete.txt"
    if root.exists() and any(root.iterdir()):
        if not marker.is_file() or marker.read_bytes() != content.encode():
            raise UserError(f"{printable(root)} exists and does not hold {content}: give a new folder")
        if complete.is_file():
            return
    root.mkdir(parents=True, exist_ok=True)
    marker.write_bytes(content.encode())
    make_folder = cache(partial(Path.mkdir, parents=True, exist_ok=True))  # once for its thousands of files
    with show_progress("images", total) as progress:
        for number, target in enumerate(root / name for name in names):
            if number % 1000 == 0:
                progress.advance(min(1000, total - number))
            make_folder(target.parent)
            if not target.exists():
                write(number, target)
    complete.touch()


def write_photograph(number: int, target: Path, sides: tuple[int, int], spread: float) -> None:
    """Blend two windows of photographs under a sensor's grain; another number gives another image.

    The sides vary by the share `spread`, and a quarter of the images are upright, as they come from cameras.
    """
    random = np.random.default_rng((0, number))
    shape = np.array(sides[::-1] if random.random() < 0.25 else sides)
    width, height = np.rint(shape * random.uniform(1 - spread, 1 + spread, 2)).astype(int).tolist()
    pixels = random.normal(0, random.uniform(4, 10), (height, width, 1))
    share, photos = random.uniform(0.2, 0.5), list(read_photographs().values())
    for weight in (share, 1 - share):
        photo = photos[random.integers(2)]
        scale = random.uniform(0.6, 1.0) * min(photo.width / width, photo.height / height)
        w, h = scale * width, scale * height
        x, y = random.uniform(0, photo.width - w), random.uniform(0, photo.height - h)
        window = photo.resize((width, height), Image.Resampling.BICUBIC, (x, y, x + w, y + h))
        pixels = pixels + weight * np.asarray(window)[:, :: random.choice([-1, 1]), random.permutation(3)]
    part = target.with_suffix(".part")
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(part, "JPEG", quality=90 + number % 6)
    part.replace(target)
