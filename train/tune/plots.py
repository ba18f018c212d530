"""Pictures of what benchmarks measured. The only module that knows matplotlib, imported when one is drawn."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.errors import SaveError, UserError
from data_pipeline.common.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Told apart by the colour-blind, too. Source: Okabe and Ito 2008, "Color Universal Design"."""
GREY = "#777777"
PANEL_INCHES = (4.4, 3.2)


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be written, before the work that it shows.

    Raises:
        UserError: a format that is none of ours, a folder that is not there, or no matplotlib.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"a picture ends in {', '.join(FORMATS)}, not {printable(path.name)}")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {printable(path.parent)} to write {printable(path.name)} to")
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise UserError("pictures need matplotlib: pip install 'alexnet[train]'") from error


@contextmanager
def draw_panels(path: Path, num_panels: int, *, width: float = 1.0) -> Iterator[list[Axes]]:
    """Panels side by side, to be drawn on, and written at the end.

    Args:
        path: ends in one of `FORMATS`.
        num_panels: how many.
        width: of each, in multiples of the usual.
    Raises:
        SaveError: it cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    wide, high = PANEL_INCHES
    style: Any = {
        "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.alpha": 0.3, "legend.frameon": False, "svg.hashsalt": "alexnet", "lines.linewidth": 1.6,
    }  # fmt: skip
    with rc_context(style):
        # Without pyplot, which would keep every figure and choose a window system.
        figure = Figure(figsize=(wide * width * num_panels, high), dpi=110, layout="constrained")
        panels = [figure.add_subplot(1, num_panels, number + 1) for number in range(num_panels)]
        yield panels
        dated = {".png": "Creation Time", ".svg": "Date", ".pdf": "CreationDate"}
        try:
            figure.savefig(path, metadata={dated[path.suffix]: None})  # the same file for the same figures
        except OSError as error:
            raise SaveError(f"{printable(path)} cannot be written: {error.strerror}") from error


def mark_line(panel: Axes, x: float, text: str, color: str, *, dashed: bool = False) -> None:
    """A vertical line with its name in the legend."""
    panel.axvline(x, color=color, linewidth=1.2, linestyle="--" if dashed else "-", label=text)
