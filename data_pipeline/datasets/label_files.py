"""Labels that stand in files of their own: what Tiny ImageNet and ImageNet ship beside images that lie flat.

Legend: a wnid is a WordNet id such as n02124075, the name of a class and of its training folder.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable
from data_pipeline.datasets.watch import Watch

WNIDS = "wnids.txt"
WORDS = ("words.txt", "synset_words.txt", "LOC_synset_mapping.txt")
"""Files that name classes for people: an id, then a tab or a blank, then the name."""

_GROUND_TRUTH = "*_validation_ground_truth.txt"
_DEVKITS = (".", "data", "devkit/data", "ILSVRC2012_devkit_t12/data", "val", "val/data")
ANNOTATIONS = (
    "<split>_annotations.txt (Tiny ImageNet), <split>.txt of 'name label' lines, LOC_val_solution.csv, "
    "or the ImageNet devkit's ILSVRC2012_validation_ground_truth.txt with meta.mat"
)

Labels = Callable[[Sequence[str], "tuple[str, ...] | None"], dict[str, str]]
"""From image names, and the classes if they are known, to the class of each image that the file names."""


def find_label_files(root: Path, split: str, watch: Watch) -> tuple[Path, Labels] | None:
    """The file that says which image of a flat split is of which class, and how to read it.

    Args:
        root: the data folder.
        split: the split's folder in it.
        watch: told of every file looked for.
    """
    folder = root / split
    listed: list[tuple[Path, Callable[[Path], Labels]]] = [
        (folder / f"{split}_annotations.txt", _read_table),
        (folder / f"{split}.txt", _read_table),
        (root / f"{split}_annotations.txt", _read_table),
        (root / f"{split}.txt", _read_table),
    ]
    if split == "val":
        listed += [(where / "LOC_val_solution.csv", _read_solution) for where in (folder, root)]
    for path, reader in listed:
        watch.note(path)
        if path.is_file():
            return path, reader(path)
    if split == "val":
        for devkit in (root / name for name in _DEVKITS):
            watch.note(devkit)
            for path in sorted(devkit.glob(_GROUND_TRUTH)):
                watch.note(path)
                return path, _read_ground_truth(path, watch)
    return None


def read_class_names(root: Path, classes: Sequence[str], watch: Watch) -> tuple[str, ...]:
    """Names of the classes for people to read, where the data has a file of them.

    The first of several synonyms, all of them where the first would name two classes, and the id behind
    those that are still the same (ImageNet's two cranes, the bird and the machine).

    Returns:
        (len(classes)) names; empty if there is no file, or it names none of the classes.
    """
    for name in WORDS:
        watch.note(root / name)
    known: dict[str, str] = {}
    for path in (root / name for name in WORDS if (root / name).is_file()):
        wanted = set(classes)
        for _, line in _lines(path):
            key, _, words = line.replace("\t", " ").partition(" ")
            if key in wanted and words.strip():
                known[key] = words.strip()
        if known:
            break
    if not known:
        return ()
    synonyms = [known.get(name, name) for name in classes]
    first = _where_unique([text.split(",")[0].strip() for text in synonyms], synonyms)
    return tuple(_where_unique(first, [f"{t} ({c})" for t, c in zip(first, classes, strict=True)]))


def read_synset_ids(root: Path, watch: Watch) -> tuple[str, ...] | None:
    """The classes that `wnids.txt` names, in byte order; None where there is no such file."""
    path = root / WNIDS
    watch.note(path)
    if not path.is_file():
        return None
    return tuple(sorted({line.strip() for _, line in _lines(path)}, key=os.fsencode))


def _where_unique(texts: list[str], otherwise: list[str]) -> list[str]:
    seen: dict[str, int] = {}
    for text in texts:
        seen[text] = seen.get(text, 0) + 1
    return [t if seen[t] == 1 else other for t, other in zip(texts, otherwise, strict=True)]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with something in them."""
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {error.strerror or error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line


def _read_table(path: Path) -> Labels:
    """Lines of an image's name and its class: by name (Tiny ImageNet), or by number from 0 (Caffe)."""
    rows: dict[str, str] = {}
    for number, line in _lines(path):
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) < 2:
            raise UserError(f"{printable(path)} line {number}: expected an image's name and its class")
        rows[fields[0].strip().rsplit("/", 1)[-1]] = fields[1].strip()

    def labels(names: Sequence[str], classes: tuple[str, ...] | None) -> dict[str, str]:
        by_number = bool(rows) and all(value.isdecimal() for value in rows.values())
        if not by_number or (classes is not None and set(rows.values()) <= set(classes)):
            return rows
        if classes is None:
            raise UserError(
                f"{printable(path)} numbers the classes and nothing says which they are: "
                f"add the train/ folder, or {WNIDS}"
            )
        numbers = {int(value) for value in rows.values()}
        if max(numbers) >= len(classes):
            raise UserError(
                f"{printable(path)} numbers classes up to {max(numbers)} and there are {len(classes)}: "
                "count from 0, in the byte order of the class folders"
            )
        return {name: classes[int(value)] for name, value in rows.items()}

    return labels


def _read_solution(path: Path) -> Labels:
    """Kaggle's table: `ImageId,PredictionString`, where the string starts with the wnid; no suffixes."""
    rows: dict[str, str] = {}
    for number, fields in enumerate(csv.reader(line for _, line in _lines(path)), 1):
        if fields[0] == "ImageId":
            continue
        if len(fields) < 2 or not fields[1].split():
            raise UserError(f"{printable(path)} row {number}: expected an image's id and its class")
        rows[fields[0]] = fields[1].split()[0]

    def labels(names: Sequence[str], classes: tuple[str, ...] | None) -> dict[str, str]:
        stems = {name.rsplit(".", 1)[0]: name for name in names}
        return {stems.get(stem, stem): wnid for stem, wnid in rows.items()}

    return labels


def _read_ground_truth(path: Path, watch: Watch) -> Labels:
    """The devkit's: line k holds the number of the class of image k; meta.mat says which wnid that is."""
    meta = path.with_name("meta.mat")
    watch.note(meta)
    wnids = _read_meta(meta)
    rows = [(number, line.strip()) for number, line in _lines(path)]
    for number, value in rows:
        if not value.isdecimal() or int(value) not in wnids:
            raise UserError(f"{printable(path)} line {number}: {value!r} is no class number of {meta.name}")

    def labels(names: Sequence[str], classes: tuple[str, ...] | None) -> dict[str, str]:
        by_number = {int(stem.rsplit("_", 1)[-1]): name for name in names if (stem := _numbered(name))}
        return {
            by_number.get(number, f"ILSVRC2012_val_{number:08d}.JPEG"): wnids[int(value)]
            for number, (_, value) in enumerate(rows, 1)
        }

    return labels


def _numbered(name: str) -> str | None:
    stem = name.rsplit(".", 1)[0]
    return stem if stem.rsplit("_", 1)[-1].isdecimal() else None


def _read_meta(path: Path) -> Mapping[int, str]:
    """The class numbers of the ImageNet devkit, from its MATLAB file."""
    if not path.is_file():
        raise UserError(f"no {printable(path)}: it says which class each number of the ground truth means")
    try:
        from scipy.io import loadmat  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(
            f"reading {printable(path)} needs SciPy: pip install scipy, or write val.txt with "
            "a line 'name class' for each image"
        ) from error
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        return {
            int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0
        }
    except Exception as error:
        raise UserError(f"{printable(path)} is not the ImageNet devkit's meta.mat: {error}") from error
