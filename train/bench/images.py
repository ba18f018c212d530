"""Synthetic JPEGs with ImageNet-like size, spectrum and edges, for benchmarks.

A smooth gradient decodes in half the time of a photograph, so the figures would flatter every loader.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from itertools import cycle
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable

log = logging.getLogger("train")
Float = npt.NDArray[np.float64]

HEIGHT_PX, WIDTH_PX = 375, 500
NUM_CLASSES = 10
QUALITY = (85, 90)
FOLDER = Path(tempfile.gettempdir()) / "alexnet-bench-data"
"""Keeps the images of benchmarks between runs, unless the user names a folder."""
_FIELD_PX = 1024
_FIELDS = 6
_LEAVES = 60
_MARKER = "bench-images.txt"


def write_bench_images(root: Path | None, count: int) -> Path:
    """Write `root/train/<class>/<number>.jpg`, about 500 x 375 pixels each; nothing if they are there.

    The sides vary by a tenth and a quarter of the images are upright, as they come from cameras. The files
    are the same on every machine with the same Pillow.

    Args:
        root: the folder to make, or one made before; None for one of `FOLDER`.
    Returns:
        The folder.
    Raises:
        UserError: `root` holds something else.
    """
    root = root or FOLDER / str(count)
    log.info(f"{count} images in {root}")
    note = f"{count} synthetic images for benchmarks\n"
    marker = root / _MARKER
    if marker.is_file() and marker.read_text(encoding="utf-8") == note:
        return root
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{printable(root)} exists and does not hold {note.strip()}: give a new folder")
    root.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    fields = [_natural_field(random) for _ in range(_FIELDS)]
    for number in range(count):
        image = _photograph(random, fields)
        quality = int(random.integers(QUALITY[0], QUALITY[1] + 1))
        image.save(_make_place(root, number), "JPEG", quality=quality)
    marker.write_text(note, encoding="utf-8")
    return root


def write_small_images(root: Path, source: Path, count: int) -> None:
    """Write `root/train/<class>/<number>.jpg`, 64 x 64 pixels as Tiny ImageNet's; nothing if they are there.

    Args:
        source: the images of `write_bench_images`, of which these are parts.
    """
    if (root / _MARKER).is_file():
        return
    random = np.random.default_rng(0)
    photos = cycle(sorted(source.rglob("*.jpg")))
    for number in range(count):
        with Image.open(next(photos)) as image:
            x, y = (int(random.integers(0, side - 128)) for side in image.size)
            small = image.resize((64, 64), Image.Resampling.BILINEAR, (x, y, x + 128, y + 128))
        small.save(_make_place(root, number), quality=90)
    (root / _MARKER).touch()


def link_bench_images(root: Path, names: Iterable[str], total: int, num_sources: int) -> None:
    """Make hard links to the benchmark's images, which need no room; nothing if they are all there.

    Args:
        names: below `root`; `total` of them, each linked to the next image, over and over.
        num_sources: how many images there are.
    Raises:
        UserError: `root` holds something else.
    """
    if (root / "complete.txt").is_file():
        return
    marker = root / "bench-links.txt"
    if root.exists() and any(root.iterdir()) and not marker.is_file():
        raise UserError(f"{printable(root)} exists and holds no links of a benchmark: give a new folder")
    root.mkdir(parents=True, exist_ok=True)
    marker.touch()
    photos = cycle(sorted(write_bench_images(None, num_sources).rglob("*.jpg")))
    made: set[Path] = set()
    with show_progress("linking files", total) as progress:
        for number, target in enumerate((root / name for name in names), start=1):
            if target.parent not in made:
                target.parent.mkdir(parents=True, exist_ok=True)
                made.add(target.parent)
            with suppress(FileExistsError):
                os.link(next(photos), target)
            if number % 10_000 == 0:
                progress.advance(10_000)
    (root / "complete.txt").touch()


def _make_place(root: Path, number: int) -> Path:
    """Return where an image belongs, in its class's folder, which is made."""
    target = root / "train" / f"class-{number % NUM_CLASSES}" / f"{number:05d}.jpg"
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _natural_field(random: np.random.Generator) -> Float:
    """Return noise (side, side), mean 0, deviation 1; its amplitudes fall as 1 / f, as those of photographs.

    Source: Field 1987, "Relations between the statistics of natural images".
    """
    frequency = np.hypot(np.fft.fftfreq(_FIELD_PX)[:, None], np.fft.rfftfreq(_FIELD_PX)[None, :])
    frequency[0, 0] = np.inf
    phases = np.exp(2j * np.pi * random.random(frequency.shape))
    field: Float = np.fft.irfft2(phases / frequency**1.1, s=(_FIELD_PX, _FIELD_PX))
    field -= field.mean()
    field /= field.std()
    return field


def _photograph(random: np.random.Generator, fields: list[Float]) -> Image.Image:
    """Draw leaves of flat colour, one upon another, under natural texture and a little of the sensor's noise.

    Source: Lee, Mumford and Huang 2001, "Occlusion models for natural images" (dead leaves).
    """
    sides = np.rint(np.array([HEIGHT_PX, WIDTH_PX]) * random.uniform(0.9, 1.1, 2)).astype(int)
    height, width = sides[::-1] if random.random() < 0.25 else sides
    image = Image.new("RGB", (int(width), int(height)), _color(random))
    draw = ImageDraw.Draw(image)
    for _ in range(_LEAVES):
        radius = min(8 / random.random(), 160)  # radii fall off as 1 / r^2
        x, y = random.random() * width, random.random() * height
        box = (x - radius, y - radius * random.uniform(0.4, 1), x + radius, y + radius)
        (draw.ellipse if random.random() < 0.7 else draw.rectangle)(box, fill=_color(random))
    top, left = random.integers(0, _FIELD_PX - 560, 2)
    window = np.s_[top : top + height, left : left + width]
    pick = random.permutation(len(fields))
    shade = fields[pick[0]][window]
    tint = fields[pick[1]][window]
    colors = shade[..., None] * random.uniform(18, 36) + tint[..., None] * random.normal(0, 8, 3)
    grain = random.normal(0, random.uniform(2, 8), (height, width, 1))
    pixels = np.asarray(image) * 0.8 + 25 + colors + grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _color(random: np.random.Generator) -> tuple[int, int, int]:
    gray = random.uniform(20, 230)
    red, green, blue = np.clip(gray + random.normal(0, 25, 3), 0, 255).astype(int)
    return int(red), int(green), int(blue)
