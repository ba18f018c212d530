"""The true classes of the inputs, by their folders or from a file, and what share of them was recognised."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from data_pipeline.common.errors import UserError, raising
from data_pipeline.common.text import composed, printable, text_lines
from data_pipeline.shards.shard_format import COMPRESSED_SUFFIXES
from infer.bundle.load import Bundle
from infer.predict.inputs import SHARD_SUFFIX, Inputs

FOLDER = "folder"
Ranks = Counter[int]
"""The number of images whose true class has each place among all classes by probability, from 1 on."""
NUM_SHOWN = 3
"""Most names in a message."""


def accuracy_words(ranks: Ranks) -> str:
    """The accuracy, for the end of the summary."""
    if not (images := ranks.total()):
        return "no image that could be read has a truth"
    top5 = sum(count for rank, count in ranks.items() if rank <= 5)
    return f"top-1 {ranks[1] / images:.2%}, top-5 {top5 / images:.2%} of {images} images with a truth"


class TrueClasses:
    """The true class of each input.

    Args:
        bundle: whose classes they are.
        listed: the class of each path in a file, for `class_at`; None to take the folders' names.
    """

    def __init__(self, bundle: Bundle, listed: dict[str, int] | None = None) -> None:
        self._ids = class_ids(bundle)
        self._listed = listed
        self._found: set[str] = set()

    def class_at(self, path: Path) -> int | None:
        """Return the place of an input's class among the model's; None if a file of truths lacks the input.

        Raises:
            UserError: its folder is not named by a class.
        """
        if self._listed is None:
            folder = class_folder(path)
            self.check_folders([folder])
            return self._ids[composed(printable(folder))]
        text = os.path.abspath(path)  # noqa: PTH100 - no Path: that costs more than the look-up
        start = 0
        while (found := self._listed.get(text[start:])) is None:  # the longest end of the path that is listed
            start = text.find("/", start) + 1
            if start == 0:
                return None
        self._found.add(text[start:])
        return found

    def check_folders(self, names: Iterable[str]) -> None:
        """Refuse folders that no class names.

        Raises:
            UserError: naming the first few.
        """
        unknown = dict.fromkeys(name for name in names if composed(printable(name)) not in self._ids)
        if unknown:
            raise UserError(_unknown("folder", unknown, self._ids))

    @property
    def num_unused(self) -> int:
        """The number of listed paths that no input has had so far."""
        return 0 if self._listed is None else len(self._listed) - len(self._found)


def open_truth(option: str, bundle: Bundle, inputs: Inputs) -> TrueClasses:
    """Open the true classes.

    Args:
        option: `folder`, or a file of paths and classes, see `read_truth`.
        inputs: of the prediction.
    Raises:
        UserError: no such file, or classes that the model does not have.
    """
    if option != FOLDER:
        return TrueClasses(bundle, read_truth(Path(option), class_ids(bundle)))
    truth = TrueClasses(bundle)
    # Those of the inputs that are known before the prediction.
    files = (path for path in inputs.files() if not path.endswith((SHARD_SUFFIX, *COMPRESSED_SUFFIXES)))
    parents = dict.fromkeys(os.path.dirname(path) for path in files)  # noqa: PTH120 - many, and few parents
    truth.check_folders(class_folder(Path(parent, "_")) for parent in parents)
    return truth


def class_folder(path: Path) -> str:
    """Return the name of the folder that says an image's class; Tiny ImageNet has `images` below it.

    >>> class_folder(Path("/val/cat/1.jpg")), class_folder(Path("/train/n01443537/images/1.JPEG"))
    ('cat', 'n01443537')
    """
    parent = Path(os.path.abspath(path)).parent  # noqa: PTH100 - follows no link
    return (parent.parent if parent.name == "images" else parent).name


def class_ids(bundle: Bundle) -> dict[str, int]:
    """Map the names of a model's classes, and the labels that only one class has, to their places."""
    names, labels = bundle.manifest.classes, bundle.manifest.class_labels
    forms = [composed(label) for label in labels]
    times = Counter(forms)
    ids = {form: place for place, form in enumerate(forms) if times[form] == 1}
    return ids | {composed(name): place for place, name in enumerate(names)}


def read_truth(path: Path, ids: dict[str, int]) -> dict[str, int]:
    """Read a file with a path and a class a line, as CSV or, where its first line has a tab, parted by tabs.

    A first line `path,class` is a header. Further cells are ignored, as in Tiny ImageNet's
    `val_annotations.txt`.

    Args:
        ids: places of the classes by their names and labels.
    Returns:
        The class of each path.
    Raises:
        UserError: it cannot be read, has a line without a class, a path of two classes, or unknown classes.
    """
    name = printable(path)
    with raising(UserError, f"--truth {name} cannot be read"):
        lines = text_lines(path.read_bytes(), path)
    reader = csv.reader(lines, delimiter="\t" if lines and "\t" in lines[0] else ",")
    classes: dict[str, int] = {}
    unknown: dict[str, None] = {}
    for cells in _rows(reader, name):
        is_header = reader.line_num == 1 and [cell.strip().lower() for cell in cells[:2]] == ["path", "class"]
        if is_header or not cells:
            continue
        where = f"--truth {name} line {reader.line_num}"
        if len(cells) < 2 or not cells[0]:
            raise UserError(f"{where} is no path and class: {printable(','.join(cells))}")
        place, listed = ids.get(composed(printable(cells[1].strip()))), os.path.normpath(cells[0])
        if place is None:
            unknown[cells[1].strip()] = None
        elif classes.setdefault(listed, place) != place:
            raise UserError(f"{where} has another class for {printable(listed)} than before")
    if unknown:
        raise UserError(_unknown(name, unknown, ids))
    if not classes:
        raise UserError(f"--truth {name} names no image: give it a path and a class a line, as a.jpg,cat")
    return classes


def _rows(reader: Iterator[list[str]], name: str) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"--truth {name} is no CSV: {error}") from error


def _unknown(where: str, names: Collection[str], known: Iterable[str]) -> str:
    shown = ", ".join(map(printable, list(names)[:NUM_SHOWN]))
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return (
        f"--truth {where}: {len(names)} name(s) are no class of the model ({shown}{more}): name classes as "
        f"the model does, such as {', '.join(list(known)[-NUM_SHOWN:])}"
    )
