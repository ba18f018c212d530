"""Reads labels from files of their own, which Tiny ImageNet and ImageNet ship beside images that lie flat.

Legend: a synset id is a WordNet id such as n02124075, the name of a class and of its training folder.
"""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from data_pipeline.common.errors import UserError, raising
from data_pipeline.common.text import composed, printable, text_lines, visible
from data_pipeline.datasets.index_cache import Watch

SYNSET_IDS = "wnids.txt"
CLASS_NAMES = ("words.txt", "synset_words.txt", "LOC_synset_mapping.txt")
"""Files that name classes for people: a class, then a tab or (without one) a blank, then its names."""
MAX_CLASS_NAMES_BYTES = 64 * 2**20
MAX_NAME_CHARACTERS = 1000
"""Of all synonyms of one class; the longest in WordNet's 82,114 lines are 371 characters."""

_GROUND_TRUTH = "*_validation_ground_truth.txt"
_DEVKITS = (".", "data", "devkit/data", "ILSVRC2012_devkit_t12/data", "val", "val/data")
LABEL_FILES = (
    "<split>_annotations.txt (Tiny ImageNet), <split>.txt of 'name label' lines, LOC_val_solution.csv, "
    "or the ImageNet devkit's ILSVRC2012_validation_ground_truth.txt with meta.mat"
)

Classes = tuple[str, ...]
ReadLabels = Callable[[Path, Sequence[str], Classes | None, Watch], dict[str, str]]
"""Reads a label file. From its path, the images' names, and the classes if they are known, to the class of
each image that the file names; the watch records further files that it reads."""


def find_label_file(root: Path, split: str, folder_name: str, watch: Watch) -> tuple[Path, ReadLabels] | None:
    """Find the file that labels a flat split, and the function that reads it.

    Args:
        root: the data folder.
        split: the split.
        folder_name: of its folder, by which a file may be named, too.
        watch: records every file looked for.
    """
    folder = root / folder_name
    listed: list[tuple[Path, ReadLabels]] = [
        (where / name, _read_table)
        for where in (folder, root)
        for stem in dict.fromkeys((split, folder_name))
        for name in (f"{stem}_annotations.txt", f"{stem}.txt")
    ]
    if split == "val":
        listed += [(where / "LOC_val_solution.csv", _read_solution) for where in (folder, root)]
    for path, reader in listed:
        watch.note(path)
        if path.is_file():
            return path, reader
    if split == "val":
        for devkit in (root / name for name in _DEVKITS):
            watch.note(devkit)
            for path in sorted(devkit.glob(_GROUND_TRUTH)):
                watch.note(path)
                return path, _read_ground_truth
    return None


def read_class_names(root: Path, classes: Sequence[str], watch: Watch) -> tuple[str, ...]:
    """Read the names of the classes for people, where the data has a file of them.

    A class gets the first of its synonyms, which commas part, and the next ones where that names another
    class too (ImageNet's "maillot" and "maillot, tank suit"). Where even all of them do, the class itself
    stands behind in brackets (its two cranes, the bird and the machine). A class that the file does not name
    keeps its own name. Control characters and bytes that are not UTF-8 are shown as `\\xNN`.

    Returns:
        (len(classes)) names; empty if there is no file, or it names none of the classes.
    Raises:
        UserError: a file that is too large, a name that is too long, or two different names of one class.
    """
    wanted = {composed(name): name for name in classes}
    for path in (root / name for name in CLASS_NAMES):
        watch.note(path)
        if path.is_file() and (known := _read_synonyms(path, wanted)):
            return _distinct([known.get(name) or visible(printable(name)) for name in classes], classes)
    return ()


def read_synset_ids(root: Path, watch: Watch) -> Classes | None:
    """Read the classes that `wnids.txt` names, in byte order; None where there is no such file."""
    path = root / SYNSET_IDS
    watch.note(path)
    if not path.is_file():
        return None
    return tuple(sorted({line.strip() for _, line in _lines(path)}, key=os.fsencode))


def _read_synonyms(path: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    """The names of those classes that are wanted, by class, as their line has them."""
    if path.stat().st_size > MAX_CLASS_NAMES_BYTES:
        raise UserError(
            f"{printable(path)} is larger than {MAX_CLASS_NAMES_BYTES >> 20} MiB: "
            "it should hold a line 'class<TAB>name' for each class"
        )
    known: dict[str, str] = {}
    for number, line in _lines(path):
        # By the tab alone where there is one, since the name of a folder may hold blanks.
        key, _, rest = line.partition("\t") if "\t" in line else line.strip().partition(" ")
        name, text = wanted.get(composed(key.strip())), rest.strip()
        if name is None or not text:
            continue
        where = f"{printable(path)} line {number}"
        if len(text) > MAX_NAME_CHARACTERS:
            raise UserError(f"{where}: a name of {len(text)} characters; at most {MAX_NAME_CHARACTERS}")
        text = visible(printable(text))
        if known.setdefault(name, text) != text:
            raise UserError(
                f"{where} names {visible(printable(name))} a second time, and differently: keep one of them"
            )
    return known


def _distinct(names: list[str], classes: Sequence[str]) -> tuple[str, ...]:
    """As few synonyms of each as tell it from the others; the class behind them where all do not."""
    synonyms = [[one.strip() for one in text.split(",") if one.strip()] or [text] for text in names]
    taken = [1] * len(names)
    while True:
        labels = [", ".join(parts[:count]) for parts, count in zip(synonyms, taken, strict=True)]
        counts = Counter(labels)
        growing = [i for i, t in enumerate(labels) if counts[t] > 1 and taken[i] < len(synonyms[i])]
        if not growing:
            break
        for i in growing:
            taken[i] += 1
    return tuple(
        label if counts[label] == 1 else f"{label} ({visible(printable(name))})"
        for label, name in zip(labels, classes, strict=True)
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, numbered from 1."""
    with raising(UserError, f"cannot read {printable(path)}"):
        data = path.read_bytes()
    for number, line in enumerate(text_lines(data, path), 1):
        if line.strip():
            yield number, line


def _read_table(path: Path, names: Sequence[str], classes: Classes | None, watch: Watch) -> dict[str, str]:
    """Lines of an image's name and its class: by name (Tiny ImageNet), or by number from 0 (Caffe)."""
    rows: dict[str, str] = {}
    for number, line in _lines(path):
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) < 2:
            raise UserError(f"{printable(path)} line {number}: expected an image's name and its class")
        rows[fields[0].strip().rsplit("/", 1)[-1]] = fields[1].strip()
    by_number = bool(rows) and all(value.isdecimal() for value in rows.values())
    if not by_number or (classes is not None and set(rows.values()) <= set(classes)):
        return rows
    if classes is None:
        raise UserError(
            f"{printable(path)} numbers the classes and nothing says which they are: "
            f"add the train/ folder, or {SYNSET_IDS}"
        )
    highest = max(int(value) for value in rows.values())
    if highest >= len(classes):
        raise UserError(
            f"{printable(path)} numbers classes up to {highest} and there are {len(classes)}: "
            "count from 0, in the byte order of the class folders"
        )
    return {name: classes[int(value)] for name, value in rows.items()}


def _read_solution(path: Path, names: Sequence[str], classes: Classes | None, watch: Watch) -> dict[str, str]:
    """Kaggle's table: `ImageId,PredictionString`, which starts with the synset id; ids have no suffix."""
    stems = {name.rsplit(".", 1)[0]: name for name in names}
    labels: dict[str, str] = {}
    for number, fields in enumerate(csv.reader(line for _, line in _lines(path)), 1):
        if fields[0] == "ImageId":
            continue
        if len(fields) < 2 or not fields[1].split():
            raise UserError(f"{printable(path)} row {number}: expected an image's id and its class")
        labels[stems.get(fields[0], fields[0])] = fields[1].split()[0]
    return labels


def _read_ground_truth(
    path: Path, names: Sequence[str], classes: Classes | None, watch: Watch
) -> dict[str, str]:
    """The devkit's: line k holds the number of the class of image k; meta.mat maps it to a synset id."""
    meta = path.with_name("meta.mat")
    watch.note(meta)
    synset_ids = _read_meta(meta)
    numbered = {}
    for name in names:
        digits = name.rsplit(".", 1)[0].rsplit("_", 1)[-1]
        if digits.isdecimal():
            numbered[int(digits)] = name
    labels: dict[str, str] = {}
    for image, (line, text) in enumerate(_lines(path), 1):
        value = text.strip()
        if not value.isdecimal() or int(value) not in synset_ids:
            raise UserError(f"{printable(path)} line {line}: {value!r} is no class number of {meta.name}")
        labels[numbered.get(image, f"ILSVRC2012_val_{image:08d}.JPEG")] = synset_ids[int(value)]
    return labels


def _read_meta(path: Path) -> Mapping[int, str]:
    """Read the class numbers of the ImageNet devkit from its MATLAB file."""
    if not path.is_file():
        raise UserError(f"no {printable(path)}: it says which class each number of the ground truth means")
    try:
        from scipy.io import loadmat
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
