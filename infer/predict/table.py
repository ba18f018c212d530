"""Rows as a table for people, and a summary of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from data_pipeline.common.console import make_console
from data_pipeline.common.passed_over import PassedOver
from data_pipeline.common.text import visible
from infer.predict.rows import ClassNames, ErrorRow, OkRow, PredictionWithPixels, Row
from infer.predict.truth import Ranks, accuracy_words
from infer.predict.writers import name_unwritable
from infer.runtime.base import InferenceBackend

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

GAP = "  "
MIN_PATH_CELLS, MAX_PATH_CELLS = 16, 48
MIN_CLASS_CELLS, MAX_CLASS_CELLS = 10, 24
MAX_NAME_CELLS = 16
NAME_HEADING = "class"
PERCENT_CELLS = 7  # " 100.0%"
FILE_WIDTH = 120
"""Width of a table that goes to a file or a pipe."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of a prediction, its speed, and what it really ran on.

    Attributes:
        images: rows of this run.
        errors: those of them that could not be read.
        kept, kept_errors: the same of an earlier run that this one resumed.
        seconds: duration of this run.
        images_per_s: `images` by `seconds`.
        start_s: seconds until the first row: loading the model, and the first batch; the longest of
            Ray's workers.
        backend, provider, device, precision: see `infer.runtime.base.InferenceBackend`.
        passed_over: files of folders and shards that are no images, by lower-case suffix.
        accuracy: of the images with a truth, those of an earlier run too, in words.
    """

    images: int
    errors: int
    kept: int
    kept_errors: int
    seconds: float
    images_per_s: float
    start_s: float
    backend: str
    provider: str
    device: str
    precision: str
    passed_over: dict[str, int] = {}
    accuracy: str | msgspec.UnsetType = msgspec.UNSET

    def sentence(self) -> str:
        """One line for stderr."""
        passed_over = f"; passed over {PassedOver(self.passed_over).sentence()}" if self.passed_over else ""
        kept = f" after {self.kept} of an earlier run" if self.kept else ""
        failed = f", {self.errors} of them could not be read" if self.errors else ""
        return (
            f"{self.images} images{kept}{failed}, in {self.seconds:.1f} s ({self.images_per_s:.1f} images/s) "
            f"with {self.provider}, {self.precision}, on {self.device}; "
            f"the start took {self.start_s:.1f} s{passed_over}"
            f"{f'; {self.accuracy}' if self.accuracy else ''}"
        )


class RowCounter:
    """Counts rows, and the seconds since the first was asked for.

    Args:
        backend: the model, for the summary.
        load_s: seconds that loading it took.
        ranks: counts the places of true classes; None for rows without truth.
    """

    def __init__(self, backend: InferenceBackend, load_s: float = 0.0, ranks: Ranks | None = None) -> None:
        self._backend, self._ranks = backend, ranks
        self._seconds, self._start_s = 0.0, load_s
        self.images = self.errors = 0

    def count(self, predictions: Iterable[PredictionWithPixels]) -> Iterator[PredictionWithPixels]:
        """Pass rows on, and count them."""
        started = time.perf_counter()
        for one in predictions:
            self.images += 1
            self.errors += isinstance(one.row, ErrorRow)
            if self._ranks is not None and isinstance(one.row, OkRow) and one.row.truth:
                self._ranks[one.row.truth.rank] += 1
            self._seconds = time.perf_counter() - started
            if self.images == 1:
                self._start_s += self._seconds
            yield one

    def summary(self, kept: int = 0, kept_errors: int = 0, passed_over: PassedOver | None = None) -> Summary:
        """The rows until now.

        Args:
            kept: rows of an earlier run that this one resumed.
            kept_errors: how many of them are errors.
            passed_over: of the inputs.
        """
        backend = self._backend
        return Summary(
            images=self.images,
            errors=self.errors,
            kept=kept,
            kept_errors=kept_errors,
            seconds=self._seconds,
            images_per_s=self.images / self._seconds if self._seconds else 0.0,
            start_s=self._start_s,
            backend=backend.name,
            provider=backend.provider,
            device=backend.device,
            precision=backend.precision,
            passed_over={} if passed_over is None else passed_over.by_count,
            accuracy=msgspec.UNSET if self._ranks is None else accuracy_words(self._ranks),
        )


class TableWriter:
    """Prints each row as it comes, in columns whose width does not change.

    Long labels lose their end and long paths their beginning; percentages and reasons are never cut.

    Args:
        console: prints; its width decides how many of the `places` classes have room.
        places: classes in a row.
        label_cells: width of the longest label; the columns are no wider than it needs.
        name_cells: width of the longest name of a class in the data, which stands behind the best label.
        truth: whether the true class has the last column.
    """

    def __init__(
        self,
        console: Console,
        places: int,
        label_cells: int = MAX_CLASS_CELLS,
        name_cells: int = 0,
        *,
        truth: bool = False,
    ) -> None:
        from rich.cells import set_cell_size
        from rich.text import Text

        self._console, self._text = console, Text
        self._name_cells = name_cells and min(max(name_cells, len(NAME_HEADING)), MAX_NAME_CELLS)
        self._truth_cells = truth and max(len("truth"), min(label_cells, MAX_CLASS_CELLS - PERCENT_CELLS))
        beside = [cells + len(GAP) for cells in (self._name_cells, self._truth_cells) if cells]
        width = console.width - sum(beside)
        self._path_cells, self._class_cells, self._shown = layout(width, places, label_cells)
        header = Text(style="bold")
        header.append(set_cell_size("image", self._path_cells))
        for place in range(1, self._shown + 1):
            header.append(GAP + set_cell_size(f"#{place}", self._class_cells))
            if place == 1 and self._name_cells:
                header.append(GAP + set_cell_size(NAME_HEADING, self._name_cells))
        self._width = header.cell_len  # of all columns but the truth
        if truth:
            header.append(f"{GAP}truth")
        _print(console, header)

    def write(self, row: Row) -> None:
        if isinstance(row, OkRow):
            line = self._text(_tail(visible(row.path), self._path_cells))
            for place, prediction in enumerate(row.predictions[: self._shown]):
                label = self._text(visible(prediction.label))
                label.truncate(self._class_cells - PERCENT_CELLS, overflow="ellipsis", pad=True)
                cell = f"{GAP}{label.plain}{prediction.probability:>{PERCENT_CELLS}.1%}"
                line.append(cell, style="bold green" if place == 0 else "dim")
                if place == 0 and self._name_cells:
                    name = self._text(visible(prediction.class_name or ""))
                    name.truncate(self._name_cells, overflow="ellipsis", pad=True)
                    line.append(GAP + name.plain)
            if row.truth:
                line.append(" " * (self._width - line.cell_len))
                label = self._text(visible(row.truth.label))
                label.truncate(self._truth_cells, overflow="ellipsis")
                line.append(GAP + label.plain, style="green" if row.truth.rank == 1 else "bold red")
        else:
            line = self._text(f"{visible(row.path)}{GAP}error: {visible(row.error)}", style="red")
        _print(self._console, line)


@contextmanager
def open_table(
    output: Path | None, names: ClassNames, places: int, truth: bool = False
) -> Iterator[TableWriter]:
    """A writer of a table.

    Args:
        output: the file; None for stdout.
        names: of all classes.
        places: classes in a row.
        truth: whether rows have the true class.
    Raises:
        UserError: the file cannot be written.
    """
    from rich.cells import cell_len

    cells = [max((cell_len(visible(name)) for name in column), default=0) for column in names]
    if output is None:
        width = None if sys.stdout.isatty() else FILE_WIDTH
        yield TableWriter(make_console(width=width), places, *cells, truth=truth)
        return
    with name_unwritable(output):
        file = output.open("w", encoding="utf-8")
    with file:
        yield TableWriter(make_console(file=file, width=FILE_WIDTH), places, *cells, truth=truth)


def layout(width: int, top: int, label_cells: int = MAX_CLASS_CELLS) -> tuple[int, int, int]:
    """Shares a line among the path and the classes.

    Args:
        width: cells of a line.
        top: classes that are wanted.
        label_cells: width of the longest label.
    Returns:
        Cells of the path, cells of each class, and how many classes there is room for (at least one).

    >>> layout(100, 5)
    (20, 14, 5)
    """
    gap = len(GAP)
    most = min(MAX_CLASS_CELLS, label_cells + PERCENT_CELLS)
    least = min(MIN_CLASS_CELLS, most)
    shown = max(1, min(top, (width - MIN_PATH_CELLS) // (least + gap)))
    class_cells = max(least, min(most, (width - MIN_PATH_CELLS) // shown - gap))
    path_cells = min(MAX_PATH_CELLS, width - shown * (class_cells + gap))
    return max(1, path_cells), class_cells, shown


def _tail(text: str, cells: int) -> str:
    """The end of a text, exactly so many cells wide."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(text) <= cells:
        return set_cell_size(text, cells)
    while cell_len(text) > cells - 1:
        text = text[1:]
    return set_cell_size("…" + text, cells)


def _print(console: Console, line: Text) -> None:
    # Wrapping would break the columns, and cutting would hide reasons, so the terminal may fold a line.
    console.print(line, soft_wrap=True, highlight=False)
