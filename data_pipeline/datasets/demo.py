"""The images that scikit-learn ships: its digits, written as the demo data, and its two photographs."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import writing_to
from data_pipeline.common.text import printable

DEMO_ROOT = Path("data/demo-digits")
"""The folder that training and `alexnet data demo` write to."""

SIDE_PX = 64
NUM_SCANS = 1797
MARKER = "README.txt"
_README = """Handwritten digits: {train} training and {val} validation images of 10 classes, {side} pixels.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository
(CC BY 4.0), the 1,797 scans of 8 x 8 pixels and 17 gray levels that scikit-learn ships; enlarged bicubically.
No scan is in both splits. Written by `alexnet data demo`.
"""


def write_demo(root: Path) -> None:
    """Write the digits to `root/train/<digit>/*.jpg` and `root/val/<digit>/*.jpg`, unless they are there.

    The folder appears whole or not at all, also when several processes write it at once.

    Args:
        root: the folder to make.
    Raises:
        UserError: `root` holds something else or cannot be written, or scikit-learn is not installed.
        SaveError: the disk is full.
    """
    root = Path(root)
    if is_demo(root):
        return
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{printable(root)} exists and is not the demo data: give an empty or a new folder")
    scans = _read_digits()
    with writing_to(root, "name another folder: alexnet data demo DIR"):
        root.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
        try:
            _write(*scans, temporary)
            temporary.chmod(0o755)  # mkdtemp makes it private
            try:
                temporary.rename(root)  # replaces an empty folder, never a full one
            except OSError:
                if not is_demo(root):
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def is_demo(root: Path) -> bool:
    """Whether a folder holds the whole demo data: its marker, and every image."""
    return (Path(root) / MARKER).is_file() and sum(1 for _ in Path(root).glob("*/*/*.jpg")) == NUM_SCANS


@cache
def read_photographs() -> dict[str, Image.Image]:
    """Read the two photographs of scikit-learn, RGB of 640 x 427 pixels, by their file names.

    Raises:
        UserError: scikit-learn is not installed.
    """
    folder = _shipped("the photographs come") / "images"
    return {name: Image.open(folder / name).convert("RGB") for name in ("china.jpg", "flower.jpg")}


def _read_digits() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read the scans (N, 8, 8), of 17 gray levels, 0 to 16, and their digits (N)."""
    table = np.loadtxt(_shipped("the demo data comes") / "data" / "digits.csv.gz", np.uint8, delimiter=",")
    return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)


def _shipped(what_comes: str) -> Path:
    """Return the folder of scikit-learn's data; to import it takes seconds, and sets variables of OpenMP."""
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise UserError(
            f"{what_comes} with scikit-learn, which is not installed: pip install 'alexnet[train]'"
        )
    return Path(found.origin).parent / "datasets"


def validation_scans(grays: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Choose the scans of the validation split: the fifth of each class with the smallest hashes.

    Args:
        grays: (N, 8, 8) scans.
        labels: (N) digits.
    Returns:
        (N) True for validation.
    """
    hashes = np.array([hashlib.sha256(scan.tobytes()).hexdigest() for scan in grays])
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        held_out[members[np.argsort(hashes[members], kind="stable")[: len(members) // 5]]] = True
    return held_out


def _write(levels_NHW: npt.NDArray[np.uint8], labels_N: npt.NDArray[np.int64], folder: Path) -> None:
    """Write scans of 17 gray levels, 0 to 16."""
    grays = np.rint(levels_NHW * (255 / 16)).astype(np.uint8)
    held_out = validation_scans(grays, labels_N)
    for number, (scan, label) in enumerate(zip(grays, labels_N, strict=True)):
        target = folder / ("val" if held_out[number] else "train") / str(label) / f"{number:04d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        enlarged = Image.fromarray(scan).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
        enlarged.convert("RGB").save(target, "JPEG", quality=90)
    readme = _README.format(train=int((~held_out).sum()), val=int(held_out.sum()), side=SIDE_PX)
    (folder / MARKER).write_text(readme, encoding="utf-8")
