"""Writes the report of a run or an export as one HTML file."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import write_atomic, writing_to
from data_pipeline.results.outputs import check_page
from infer.report.classes import make_classes, make_confusion
from infer.report.curves import make_curves
from infer.report.facts import make_configuration, make_provenance, make_speed, make_summary
from infer.report.filters import make_filters
from infer.report.page import GENERATOR, note, render_page, table
from infer.report.pictures import make_mistakes, make_neighbours, make_predictions
from infer.report.source import Source, find_source

NAME = "report.html"
HEADINGS = {
    "summary": "Summary",
    "curves": "Curves",
    "filters": "Filters of the first convolution",
    "predictions": "Pictures and what was predicted",
    "neighbours": "Nearest neighbours in the last hidden layer",
    "classes": "Classes",
    "confusion": "Which class is taken for which",
    "mistakes": "The most confident mistakes",
    "configuration": "Configuration",
    "provenance": "Provenance",
    "speed": "Speed and exports",
}
"""Of the sections in their order, by the keys that are their addresses in the page."""
PICTURES = {"predictions": make_predictions, "neighbours": make_neighbours, "mistakes": make_mistakes}
"""The sections that need validation images, by their keys."""


def write_report(path: Path | None, output: Path | None, data: Path | None) -> Path:
    """Write a report.

    Args:
        path: a run or an export, see `find_source`.
        output: the file; None for `report.html` in the run, or where there is none, in the current folder.
        data: folder with the split `val`; None for the one that the run was trained on.
    Returns:
        The file that was written.
    Raises:
        UserError: nothing to report on, a place that cannot be written, or data of other classes.
        CorruptFileError: see `find_source`.
        SaveError: the disk is full.
    """
    source = find_source(path)
    target = output or (source.run or Path()) / NAME
    check_page(target, "--output", GENERATOR, "a report", suffixes=(".html", ".htm"))
    page = make_page(source, data)
    with writing_to(target, "name another file with --output"):
        write_atomic(target, page.encode("utf-8", "backslashreplace"))
    return target


def make_page(source: Source, data: Path | None) -> str:
    """Make the page, each part as far as its files are there."""
    bodies = make_pictures(source, data) | {
        "summary": make_summary(source),
        "curves": make_curves(source.rows),
        "filters": make_filters(source),
        "classes": make_classes(source),
        "confusion": make_confusion(source),
        "configuration": make_configuration(source),
        "provenance": make_provenance(source),
        "speed": make_speed(source),
    }
    return render_page(f"AlexNet report: {source.name}", HEADINGS, bodies)


def make_pictures(source: Source, data: Path | None) -> dict[str, str]:
    """Make the sections, or say in each why its pictures are not there.

    Args:
        data: see `write_report`.
    Raises:
        UserError: the data that was named is not there, has other classes, or has no checkpoint to go with.
    """
    if source.checkpoint is None:
        if data is not None:
            raise UserError(f"--data is for pictures, and they need a checkpoint: {source.no_checkpoint}")
        return _without(source, f"Not shown: {source.no_checkpoint}.")
    from infer.report.look import open_look
    from train.evaluate import load_split

    try:
        split = load_split(source.checkpoint, data, "val")
    except (UserError, CorruptFileError) as error:
        if data is not None:
            raise
        root = str(source.checkpoint.config.data.root or "")
        why = str(error).replace(str(source.run), source.name)
        if root.startswith("/"):
            why = why.replace(root, f"…/{Path(root).name}")
        return _without(source, f"Not shown: {why}.")
    with open_look(source.checkpoint, split) as look:
        if not len(look.labels):
            return _without(source, f"Not shown: none of {look.num_failed} validation images could be read.")
        return {name: make(look) for name, make in PICTURES.items()}


def _without(source: Source, why: str) -> dict[str, str]:
    """The sections without images; of the mistakes, those that were recorded are listed."""
    bodies = dict.fromkeys(PICTURES, note(why))
    if source.report is not None and source.report.mistakes:
        labels = source.labels
        rows = [
            (found.path, labels.get(found.truth, found.truth), labels.get(found.predicted, found.predicted),
             f"{found.probability:.1%}")
            for found in source.report.mistakes
        ]  # fmt: skip
        bodies["mistakes"] += table(("image", "is", "taken for", "probability"), rows)
    return bodies
