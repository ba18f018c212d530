"""The sections with pictures: predictions and nearest neighbours; and what all of these are made of.

Shapes: N images, H and W rows and columns, C classes, D units of the last hidden layer, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.text import printable
from data_pipeline.transforms.sampler import permutation_at
from infer.predict.rows import rank_classes, rank_of
from infer.report.page import (
    BLUE,
    GREEN,
    Section,
    bar_row,
    figure,
    note,
    percent,
    picture,
    text,
)

if TYPE_CHECKING:
    from infer.report.look import Look, Looker

TITLES = {
    "predictions": "Pictures and what was predicted",
    "neighbours": "Nearest neighbours in the last hidden layer",
    "mistakes": "The most confident mistakes",
}
"""Of the sections with pictures, by their keys."""
NUM_RIGHT, NUM_WRONG = 5, 3
NUM_QUERIES, NUM_NEIGHBOURS = 5, 5


@dataclass(frozen=True)
class Pictures:
    """What the sections are made of.

    Attributes:
        look: at the validation images.
        looker: reads images again.
        labels: names of the classes for people, in the order of the logits.
    """

    look: Look
    looker: Looker
    labels: tuple[str, ...]

    def name(self, number: int) -> str:
        """The file of one image, relative to the data folder."""
        return printable(self.look.dataset.name_at(int(self.look.places[number])))

    def truth(self, number: int) -> str:
        """The name of its class."""
        return self.labels[int(self.look.labels[number])]

    @cached_property
    def found(self) -> NDArray[np.intp]:
        """The most probable class of each image."""
        return rank_classes(self.look.probabilities, 1)[:, 0]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Which images' most probable class is the true one."""
        right: NDArray[np.bool_] = self.found == self.look.labels
        return right

    def words(self) -> str:
        """How many images were looked at, and how many of them were right."""
        look, total = self.look, len(self.look.labels)
        some = f" {total:,} of {look.num_available:,}" if total < look.num_available else f" all {total:,}"
        failed = f", {look.num_failed} could not be read" if look.num_failed else ""
        right = percent(float(self.right.mean()))
        return (
            f"Looked at:{some} validation images{failed}; the best checkpoint takes {right} of them rightly "
            "by their centre crop."
        )


def _section(key: str, body: str) -> Section:
    return Section(key, TITLES[key], body)


def make_predictions(pictures: Pictures) -> Section:
    """Show pictures with the five most probable classes, as the paper's figure 4 on the left."""
    right_N, order = pictures.right, permutation_at(0, 1, len(pictures.look.labels))
    right = _of_various_classes(pictures, order[right_N[order]], NUM_RIGHT)
    wrong = _of_various_classes(pictures, order[~right_N[order]], NUM_WRONG)
    pixels = pictures.looker.pixels(pictures.look, [*right, *wrong])
    cards = "".join(
        _card(pictures, number, pixels[number]) for number in (*right, *wrong) if number in pixels
    )
    caption = (
        f"{len(right)} images that are recognised and {len(wrong)} that are not, in a fixed random order, "
        "each of a class of its own where there are enough; as in figure 4 (left) of Krizhevsky et al. 2012. "
        "Bars: probabilities of the five most probable classes; the true class has a tick and a green bar. "
        f"{pictures.words()}"
    )
    return _section("predictions", figure(f"<div>{cards}</div>", caption, kind="cards"))


def _of_various_classes(pictures: Pictures, order: NDArray[np.int64], count: int) -> list[int]:
    """The first images of an order, each of a class of its own as long as there are any."""
    labels = pictures.look.labels[order]
    firsts = np.sort(np.unique(labels, return_index=True)[1])
    others = np.setdiff1d(np.arange(len(order)), firsts)
    return [int(number) for number in order[np.concatenate((firsts, others))[:count]]]


def _card(pictures: Pictures, number: int, pixels_HWC: NDArray[np.uint8]) -> str:
    probabilities_C, label = pictures.look.probabilities[number], int(pictures.look.labels[number])
    best = rank_classes(probabilities_C[None], min(5, len(probabilities_C)))[0].tolist()
    bars = "".join(
        bar_row(
            pictures.labels[c],
            float(probabilities_C[c]),
            f"{probabilities_C[c]:.1%}",
            color=GREEN if c == label else BLUE,
            marked=c == label,
        )
        for c in best
    )
    truth = pictures.truth(number)
    if label not in best:
        rank = rank_of(probabilities_C, label)
        bars += f"<p>✓ {text(truth)}: {probabilities_C[label]:.2%}, in place {rank:,}</p>"
    image = picture(pixels_HWC, f"validation image of class {truth}")
    return (
        f'<div class="card">{image}<p><b>{text(truth)}</b><br>{text(pictures.name(number))}</p>{bars}</div>'
    )


def make_neighbours(pictures: Pictures) -> Section:
    """Show images beside those that are nearest to them, as the paper's figure 4 on the right."""
    look = pictures.look
    count = min(NUM_NEIGHBOURS, len(look.labels) - 1)
    if count < 1:
        return _section("neighbours", note("A single image has no neighbours."))
    nearest_NK, distances_NK = nearest(look.hidden, count)
    order = permutation_at(0, 2, len(look.labels))
    queries = _of_various_classes(pictures, order, NUM_QUERIES)
    numbers = [*queries, *(int(number) for query in queries for number in nearest_NK[query])]
    pixels = pictures.looker.pixels(look, numbers)

    def cell(number: int, below: str, right: bool | None) -> str:
        tick = "" if right is None else "✓ " if right else "✗ "
        truth = pictures.truth(number)
        shown = picture(pixels[number], f"image of class {truth}") if number in pixels else ""
        return f"<td>{shown}{tick}{text(truth)}<br>{text(below)}</td>"

    lines = []
    for query in queries:
        cells = [cell(query, pictures.name(query).rpartition("/")[2], None)]
        for number, distance in zip(nearest_NK[query].tolist(), distances_NK[query].tolist(), strict=True):
            same = bool(look.labels[number] == look.labels[query])
            cells.append(cell(number, f"at {distance:.3g}", same))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    agreeing = float((look.labels[nearest_NK[:, 0]] == look.labels).mean())
    caption = (
        f"First column: an image each of {len(queries)} classes, from a fixed random order. Beside it the "
        f"{count} other images whose activations in the last hidden layer (fc7, {look.hidden.shape[1]:,} "
        "units, as the last layer reads them) have the smallest Euclidean distance, which is below each; as "
        "in figure 4 (right) of Krizhevsky et al. 2012, there among training images. ✓ is of the same class, "
        f"✗ of another. Of all images, {agreeing:.1%} have one of their own class as the nearest. "
        f"{pictures.words()}"
    )
    content = f'<div class="scroll"><table>{"".join(lines)}</table></div>'
    return _section("neighbours", figure(content, caption, kind="near"))


def nearest(hidden_ND: NDArray[np.float32], count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The nearest others of each row by Euclidean distance, the nearest first, the earlier among equals.

    Args:
        hidden_ND: activations.
        count: K, below N.
    Returns:
        Their numbers and distances, (N, K) each.
    """
    wide_ND = hidden_ND.astype(np.float64)
    squares_N = np.square(wide_ND).sum(axis=1)
    squares_NN = np.maximum(squares_N[:, None] + squares_N - 2 * wide_ND @ wide_ND.T, 0)
    np.fill_diagonal(squares_NN, np.inf)
    nearest_NK = np.argsort(squares_NN, axis=1, kind="stable")[:, :count]
    # Again as differences: of nearly equal rows the sum above keeps few digits.
    distances_NK = np.sqrt(np.square(wide_ND[nearest_NK] - wide_ND[:, None]).sum(axis=2))
    return nearest_NK, distances_NK
