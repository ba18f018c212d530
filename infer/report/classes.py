"""The sections on classes: how many images of each are recognised, and which are taken for which.

Shapes: C classes.
"""

from __future__ import annotations

from data_pipeline.results.class_report import Averages, ClassReport, ClassRow
from infer.report.heat_map import MAX_LABELLED, MAX_NUMBERED, draw_heat_map, similar_first
from infer.report.page import BLUE, bar_row, figure, note, percent, table
from infer.report.source import Source, short_labels

NO_COUNTS = (
    "Not counted yet: a run counts its classes when it ends. `alexnet evaluate RUN --csv RUN` counts them "
    "for the checkpoint that there is, and leaves the tables where this report finds them."
)
MANY = 30
"""From how many classes on bars are small."""


def make_classes(source: Source) -> str:
    """Draw a bar for each class, sorted, with all figures in a table."""
    report = source.report
    if report is None:
        return note(_why_not_counted(source))
    known = sorted((row for row in report.classes if row.top1 is not None), key=lambda row: -(row.top1 or 0))
    short = _short(report)
    bars = "".join(
        bar_row(short[row.name], row.top1 or 0, f"{row.top1:.1%} of {row.num_samples:,}", color=BLUE)
        for row in known
    )
    caption = (
        f"Top-1 of each of {len(known)} classes, best first: the share of its images that were taken for it. "
        f"{describe_evaluation(source)}"
    )
    if empty := len(report.classes) - len(known):
        caption += f" {empty} more have no image in it."
    fine = "long fine" if len(known) > MANY else "long"
    head = ("class", "label", "images", "top-1", "top-5", "precision", "F1")
    rows = [(row.name, row.label, row.num_samples, *_shares(row)) for row in report.classes]
    means = [
        ("macro average", "each class weighs the same", None, *_shares(report.macro)),
        ("micro average", "each image weighs the same", None, *_shares(report.micro)),
    ]
    return (
        figure(f'<div class="bars">{bars}</div>', caption, kind=fine)
        + table(head, means)
        + f"<details><summary>All figures of the {len(rows)} classes</summary>"
        + table(head, rows, sortable=True)
        + "</details>"
    )


def make_confusion(source: Source) -> str:
    """Draw which classes are taken for which, and list the most frequent pairs."""
    report, counts = source.report, source.counts
    if report is None:
        return note(_why_not_counted(source))
    named = _short(report)
    labels = list(named.values())
    parts = []
    if counts is None or len(counts.confusion) != len(labels):
        parts.append(note("The run's confusion.csv, which has the count of each pair, is gone."))
    else:
        many = len(labels) > MAX_NUMBERED
        order = similar_first(counts.confusion) if many else list(range(len(labels)))
        ordered = counts.confusion[order][:, order]
        drawn = draw_heat_map(ordered, [labels[place] for place in order])
        how = (
            "Classes stand beside those that they are taken for, or that are taken for them (average linkage "
            "of the shares); squares along the diagonal are groups that look alike to the model. "
            if many
            else "The numbers are images. "
        )
        unnamed = "There are too many classes to be named here. " if len(labels) > MAX_LABELLED else ""
        caption = (
            "Rows are true classes, columns the class that the image was taken for; the darker a cell, the "
            f"larger the share of its row. {how}{unnamed}{describe_evaluation(source)}"
        )
        parts.append(figure(f'<div class="scroll" tabindex="0">{drawn}</div>', caption))
    if report.confusions:
        rows = [
            (named[pair.truth], named[pair.predicted], pair.count, percent(pair.share))
            for pair in report.confusions
        ]
        head = ("is", "taken for", "images", "share of its class")
        parts.append(f"<h3>The most frequent confusions</h3>{table(head, rows, sortable=True)}")
    else:
        parts.append("<p>No image was taken for another class.</p>")
    return "".join(parts)


def _why_not_counted(source: Source) -> str:
    return (
        NO_COUNTS if source.run is not None else "This export does not lie in its run, which has the counts."
    )


def describe_evaluation(source: Source) -> str:
    """Say which images and weights the counts are of."""
    assert source.report is not None
    images = f"{sum(row.num_samples for row in source.report.classes):,} images"
    if source.report_step is None:
        return f"Counted over {images} by a later evaluation, whose tables lie in the run's folder."
    best = source.checkpoint.step if source.checkpoint is not None else source.report_step
    differs = "" if best == source.report_step else f" (the best checkpoint is of step {best})"
    return f"Counted over {images} of the validation split at step {source.report_step}{differs}."


def _short(report: ClassReport) -> dict[str, str]:
    names = [row.name for row in report.classes]
    return dict(zip(names, short_labels(names, [row.label for row in report.classes]), strict=True))


def _shares(row: ClassRow | Averages) -> tuple[str | None, ...]:
    return tuple(percent(getattr(row, name)) for name in ("top1", "top5", "precision", "f1"))
