"""Pictures of what `bench lr` and `bench batch` measured. Imports matplotlib when one is drawn."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.common.errors import SaveError, UserError, raising
from data_pipeline.common.files import check_writable, read_head
from data_pipeline.common.text import printable
from data_pipeline.results.outputs import check_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from train.bench.harness import Report

FORMATS = (".png", ".svg", ".pdf")
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Distinct for the colour-blind, too. Source: Okabe and Ito 2008, "Color Universal Design"."""
GREY = "#777777"
CREATOR = "alexnet bench"
"""In the metadata of each picture, by which one is known that may be replaced."""
MAX_PICTURE_BYTES = 1 << 24
PANEL_INCHES = (4.4, 3.2)


def check_picture(path: Path) -> None:
    """Check that a picture can be written, before the work that it shows.

    Raises:
        UserError: a format that is none of ours, a folder that is not there or cannot be written to, a file
            that is none of our pictures, or no matplotlib.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"a picture ends in {', '.join(FORMATS)}, not {printable(path.name)}")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {printable(path.parent)} to write {printable(path.name)} to")
    check_output(path, "--plot", _is_picture_of_ours, "a picture of alexnet bench")
    check_writable(path.parent, "name another file with --plot", path)
    try:
        importlib.import_module("matplotlib")
    except ModuleNotFoundError as error:
        raise UserError("pictures need matplotlib: pip install 'alexnet[train]'") from error


def _is_picture_of_ours(path: Path) -> bool:
    """Whether a file is a small one that names its creator where pictures of each format do."""
    content = read_head(path, MAX_PICTURE_BYTES)
    return path.stat().st_size <= MAX_PICTURE_BYTES and CREATOR.encode() in content


@contextmanager
def draw_panels(path: Path, num_panels: int, *, width: float = 1.0) -> Iterator[list[Axes]]:
    """Yield panels side by side, to be drawn on, and write them at the end.

    Args:
        path: ends in one of `FORMATS`.
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
        suffix = path.suffix.lower()
        creator = "Software" if suffix == ".png" else "Creator"
        with raising(SaveError, f"{printable(path)} cannot be written"):
            # without the date: the same file for the same figures
            figure.savefig(path, metadata={dated[suffix]: None, creator: CREATOR})


def mark_line(panel: Axes, x: float, text: str, color: str, *, dashed: bool = False) -> None:
    """Draw a vertical line with its name in the legend."""
    panel.axvline(x, color=color, linewidth=1.2, linestyle="--" if dashed else "-", label=text)


def draw_rates(report: Report, path: Path) -> None:
    """Draw the loss by rate: a dot for each step, a line for each sweep's running median."""
    with draw_panels(path, 1, width=1.45) as (panel,):
        for number, sweep in enumerate(report["sweeps"]):
            color = COLORS[number % len(COLORS)]
            dots = [float("nan") if loss is None else loss for loss in sweep.losses]
            panel.plot(sweep.rates, dots, ".", color=color, markersize=2.5, alpha=0.5)
            panel.plot(sweep.rates, sweep.smoothed, color=color, label=f"seed {sweep.seed}, running median")
        recipe_rate, rate, guess = report["recipe_rate"], report["learning_rate"], report["guess_loss"]
        mark_line(panel, recipe_rate, f"the recipe's, {recipe_rate:.3g}", GREY, dashed=True)
        if rate is not None:
            mark_line(panel, rate, f"recommended, {rate:g}", "black")
        panel.axhline(guess, color=GREY, linewidth=1, linestyle=":", label="guessing")
        starts = statistics.median(sweep.smoothed[0] for sweep in report["sweeps"])
        panel.set(
            xscale="log", xlabel="learning rate", ylabel="training loss", ylim=(0, 1.25 * max(starts, guess)),
            title=f"{report['recipe']}, batch {report['global_batch']}",
        )  # fmt: skip
        panel.legend(loc="lower left", fontsize=7.5)


def draw_batches(report: Report, path: Path) -> None:
    """Draw images per second and memory by batch, and the noise scale by step."""
    sizes, global_batch = [row.batch for row in report["rows"]], report["global_batch"]
    with draw_panels(path, 3) as (speed, memory, noise):
        speed.plot(sizes, [row.images_per_s for row in report["rows"]], "o-", color=COLORS[0])
        mark_line(speed, report["knee"], f"90% of the most: {report['knee']}", COLORS[1], dashed=True)
        share = global_batch / report["ranks"]
        mark_line(speed, share, f"recommended: {share:g}", "black")
        speed.set(xscale="log", xlabel="batch of a rank", ylabel="images/s", ylim=(0, None))
        speed.set_title(f"{report['recipe']}, speed")
        speed.legend(loc="lower right", fontsize=7.5)
        limit_mb, scale = report["limit_mb"], report["noise_scale"]
        memory.plot(sizes, [row.memory_mb for row in report["rows"]], "o-", color=COLORS[0])
        memory.axhline(limit_mb, color=GREY, linestyle=":", label=f"limit: {limit_mb:.0f} MB")
        memory.set(xscale="log", yscale="log", xlabel="batch of a rank", ylabel="MB", title="peak of memory")
        memory.legend(loc="center left", fontsize=7.5)
        for panel in (speed, memory):
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.minorticks_off()
        known = [(row.step, row.noise_scale) for row in report["noise"] if row.noise_scale is not None]
        noise.plot([step for step, _ in known], [value for _, value in known], "o-", color=COLORS[2])
        noise.axhline(global_batch, color="black", label=f"recommended: {global_batch}")
        if scale is not None:
            noise.axhline(scale, color=COLORS[2], linestyle="--", label=f"of all: {scale:.0f}")
        noise.set(xlabel="step", ylabel="samples", yscale="log", title="gradient noise scale")
        noise.legend(loc="best", fontsize=7.5)
