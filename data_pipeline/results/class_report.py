"""A classifier's errors: exact counts for each pair of classes, and the figures computed from them.

A checkpoint is counted on its device, a bundle by NumPy; both end here, so that they report the same.
Legend: C classes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import astuple

from data_pipeline.common.files import check_writable, read_head, write_atomic, writing_to
from data_pipeline.results.outputs import check_output

Int = npt.NDArray[np.int64]

NUM_CONFUSIONS = 20
NUM_MISTAKES = 20
CSV_HEADS = {
    "classes.csv": "name,label,num_samples",
    "confusion.csv": "truth \\ predicted,",
    "mistakes.csv": "path,truth,",
}
"""The files of `write_csv`, and how each begins, by which it is known again."""


class ClassRow(msgspec.Struct, frozen=True, kw_only=True):
    """One class. Fractions are in 0..1; None where nothing was counted that they could be of.

    Attributes:
        name: as the data has it.
        label: for people; as the name where the data has none.
        num_samples: images of this class.
        num_predicted: images that were taken for this class, rightly or not.
        top1: share of its images that were taken for it: its recall.
        top5: share of its images with it among the five most probable.
        precision: share of the images taken for it that are of it.
        f1: harmonic mean of precision and recall.
    """

    name: str
    label: str
    num_samples: int
    num_predicted: int
    top1: float | None
    top5: float | None
    precision: float | None
    f1: float | None


class Averages(msgspec.Struct, frozen=True, kw_only=True):
    """Means over classes that have a value (macro), or of all images at once (micro)."""

    top1: float | None
    top5: float | None
    precision: float | None
    f1: float | None


class Confusion(msgspec.Struct, frozen=True, kw_only=True):
    """A pair of classes: how many images of `truth` were taken for `predicted`, and which share of them."""

    truth: str
    predicted: str
    count: int
    share: float


class Mistake(msgspec.Struct, frozen=True, kw_only=True):
    """An image that was taken for another class, and how sure the model was of that."""

    path: str
    truth: str
    predicted: str
    probability: float


class ClassReport(msgspec.Struct, frozen=True, kw_only=True):
    """The errors of a model on a split.

    Attributes:
        classes: in the order of the logits.
        macro: every class weighs the same.
        micro: every image weighs the same; top1, precision and f1 are then one number, the accuracy.
        confusions: the most frequent ones, most frequent first.
        mistakes: those of which the model was most sure, surest first.
    """

    classes: tuple[ClassRow, ...]
    macro: Averages
    micro: Averages
    confusions: tuple[Confusion, ...]
    mistakes: tuple[Mistake, ...]


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """The counts of a split.

    Attributes:
        confusion: (C, C) int64, images by true class (row) and most probable class (column).
        top5: (C) int64, images of a class with it among the five most probable.
    """

    confusion: Int
    top5: Int


def rank_mistakes(candidates: Iterable[tuple[float, int, int, int]]) -> list[tuple[float, int, int, int]]:
    """Order mistakes, the surest first, and keep the first `NUM_MISTAKES`.

    Args:
        candidates: probability, place of the image in the split, true class, predicted class.
    Returns:
        The same with probabilities rounded to four digits, so that how the work was shared, or another
        runtime's rounding, does not change the order; equal ones are in the order of the split.
    """
    rounded = [(round(float(p), 4), index, truth, found) for p, index, truth, found in candidates]
    return sorted(rounded, key=lambda mistake: (-mistake[0], mistake[1]))[:NUM_MISTAKES]


def name_mistakes(
    candidates: Iterable[tuple[float, int, int, int]], names: Sequence[str], path_at: Callable[[int], str]
) -> list[Mistake]:
    """Order mistakes as `rank_mistakes` does, and name what they are of.

    Args:
        candidates: see `rank_mistakes`.
        names: of the classes.
        path_at: the file at a place in the split, for people.
    """
    return [
        Mistake(path=path_at(index), truth=names[truth], predicted=names[found], probability=probability)
        for probability, index, truth, found in rank_mistakes(candidates)
    ]


def make_class_report(
    counts: ClassCounts, names: Sequence[str], labels: Sequence[str], mistakes: Sequence[Mistake] = ()
) -> ClassReport:
    """Derive the report from the counts, each figure by one division.

    Args:
        names: of the C classes.
        labels: for people.
        mistakes: see `ClassReport`.
    """
    confusion, hits = counts.confusion, np.diagonal(counts.confusion)
    of_class, taken_for = confusion.sum(axis=1), confusion.sum(axis=0)
    rows = []
    for c, (name, label) in enumerate(zip(names, labels, strict=True)):
        total, predicted, right = int(of_class[c]), int(taken_for[c]), int(hits[c])
        rows.append(
            ClassRow(
                name=name,
                label=label,
                num_samples=total,
                num_predicted=predicted,
                top1=_share(right, total),
                top5=_share(int(counts.top5[c]), total),
                precision=_share(right, predicted),
                f1=_share(2 * right, total + predicted),
            )
        )
    accuracy = _share(int(hits.sum()), int(confusion.sum()))
    micro_top5 = _share(int(counts.top5.sum()), int(confusion.sum()))
    return ClassReport(
        classes=tuple(rows),
        macro=Averages(
            **{name: _mean(getattr(row, name) for row in rows) for name in Averages.__struct_fields__}
        ),
        micro=Averages(top1=accuracy, top5=micro_top5, precision=accuracy, f1=accuracy),
        confusions=_frequent_confusions(confusion, names),
        mistakes=tuple(mistakes),
    )


def _frequent_confusions(confusion: Int, names: Sequence[str]) -> tuple[Confusion, ...]:
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    # Stable: pairs that are equally frequent are in the order of the classes.
    order = np.argsort(-wrong.ravel(), kind="stable")[:NUM_CONFUSIONS]
    pairs = [divmod(int(place), len(names)) for place in order if wrong.ravel()[place] > 0]
    totals = confusion.sum(axis=1)
    return tuple(
        Confusion(
            truth=names[truth],
            predicted=names[found],
            count=int(wrong[truth, found]),
            share=int(wrong[truth, found]) / int(totals[truth]),
        )
        for truth, found in pairs
    )


def _class_rows(report: ClassReport) -> Iterator[Sequence[object]]:
    """The classes, a row each, then the macro and the micro average; no value is an empty field."""
    yield ClassRow.__struct_fields__
    yield from map(astuple, report.classes)
    for name, averages in (("(macro)", report.macro), ("(micro)", report.micro)):
        yield name, name, None, None, *astuple(averages)


def _confusion_rows(counts: ClassCounts, names: Sequence[str]) -> Iterator[Sequence[object]]:
    """The C × C counts: a row for each true class, a column for each predicted one."""
    yield "truth \\ predicted", *names
    for name, row in zip(names, counts.confusion.tolist(), strict=True):
        yield name, *row


def check_csv_folder(folder: Path, option: str) -> None:
    """Make the folder of the CSV files, and refuse one in which a file of that name is not ours.

    Raises:
        UserError: naming `option`.
    """
    with writing_to(folder, f"name another folder with {option}"):
        folder.mkdir(parents=True, exist_ok=True)
    check_writable(folder, f"name another folder with {option}")
    for name, head in CSV_HEADS.items():
        check_output(folder / name, option, partial(_begins, head=head), "a table of alexnet")


def write_csv(folder: Path, counts: ClassCounts, report: ClassReport) -> None:
    """Write `classes.csv`, `confusion.csv` and `mistakes.csv`, each whole or not at all.

    Raises:
        SaveError, UserError: one cannot be written.
    """
    confusion = _confusion_rows(counts, [row.name for row in report.classes])
    mistakes = [Mistake.__struct_fields__, *map(astuple, report.mistakes)]
    for name, rows in zip(CSV_HEADS, (_class_rows(report), confusion, mistakes), strict=True):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        with writing_to(folder / name, "name another folder"):
            write_atomic(folder / name, text.getvalue().encode())


def describe_report(report: ClassReport) -> list[str]:
    """Format the classes that are recognised least, and the most frequent confusions, a line each."""
    lines = []
    known = [row for row in report.classes if row.top1 is not None]
    if worst := sorted(known, key=lambda row: row.top1 or 0.0)[:3]:
        words = [f"{_shown(row.name, row.label)} {row.top1:.1%} of {row.num_samples}" for row in worst]
        lines.append(f"lowest top-1: {', '.join(words)}")
    if report.confusions:
        labels = {row.name: _shown(row.name, row.label) for row in report.classes}
        pairs = [
            f"{labels[pair.truth]} for {labels[pair.predicted]} ({pair.count}, {pair.share:.1%})"
            for pair in report.confusions[:3]
        ]
        lines.append(f"most often taken: {', '.join(pairs)}")
    return lines


def _shown(name: str, label: str) -> str:
    return name if name == label else f"{label} ({name})"


def _begins(path: Path, head: str) -> bool:
    return read_head(path, len(head)) == head.encode()


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
