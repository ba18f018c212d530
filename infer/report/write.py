"""Writes the report of a run or an export as one HTML file."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import check_writable, read_head, write_atomic, writing_to
from data_pipeline.common.outputs import check_output
from data_pipeline.common.text import printable
from infer.report.classes import make_classes, make_confusion
from infer.report.curves import make_curves
from infer.report.facts import make_configuration, make_provenance, make_speed, make_summary
from infer.report.filters import make_filters
from infer.report.images import make_picture_sections
from infer.report.page import GENERATOR, render_page
from infer.report.source import Source, find_source

NAME = "report.html"
ELSEWHERE = "name another file with --output"


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
    check_target(target)
    page = make_page(source, data)
    with writing_to(target, ELSEWHERE):
        write_atomic(target, page.encode("utf-8", "backslashreplace"))
    return target


def check_target(path: Path) -> None:
    """Refuse a file that will not be written, before the work. An earlier report is replaced.

    Raises:
        UserError: another suffix, no such folder, one that cannot be written to, or a file that is no report.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {printable(path)}: the name must end in .html")
    if not path.parent.is_dir():
        raise UserError(f"--output {printable(path)}: there is no folder {printable(path.parent)}")
    check_output(path, "--output", _is_report, "a report")
    check_writable(path.parent, ELSEWHERE, path)


def _is_report(path: Path) -> bool:
    return GENERATOR.encode() in read_head(path, 4096)


def make_page(source: Source, data: Path | None) -> str:
    """Make the page, each part as far as its files are there."""
    pictures = make_picture_sections(source, data)
    sections = [
        make_summary(source),
        make_curves(source.rows),
        make_filters(source),
        pictures["predictions"],
        pictures["neighbours"],
        make_classes(source),
        make_confusion(source),
        pictures["mistakes"],
        make_configuration(source),
        make_provenance(source),
        make_speed(source),
    ]
    return render_page(f"AlexNet report: {source.name}", sections)
