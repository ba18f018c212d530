"""The sections with pictures: predictions, nearest neighbours, and the most confident mistakes.

Shapes: N images, H and W rows and columns, C classes, D units of the last hidden layer, K neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.transforms.sampler import permutation_at
from infer.predict.rows import rank_classes, rank_of
from infer.report.page import BLUE, GREEN, ORANGE, bar_row, figure, note, percent, picture, text

if TYPE_CHECKING:
    from infer.report.look import Look

NUM_RIGHT, NUM_WRONG = 5, 3
NUM_QUERIES, NUM_NEIGHBOURS = 5, 5
NUM_MISTAKES = 12
HEAT = (0xD5, 0x5E, 0x00)


def describe_look(look: Look) -> str:
    """The number of images looked at, and of those that were right."""
    total = len(look.labels)
    some = f" {total:,} of {look.num_available:,}" if total < look.num_available else f" all {total:,}"
    failed = f", {look.num_failed} could not be read" if look.num_failed else ""
    right = percent(float(look.right.mean()))
    return (
        f"Looked at:{some} validation images{failed}; the best checkpoint takes {right} of them rightly "
        "by their centre crop."
    )


def make_predictions(look: Look) -> str:
    """Show pictures with the five most probable classes, as the paper's figure 4 on the left."""
    right_N, order = look.right, permutation_at(0, 1, len(look.labels))
    right = _of_various_classes(look, order[right_N[order]], NUM_RIGHT)
    wrong = _of_various_classes(look, order[~right_N[order]], NUM_WRONG)
    pixels = look.pixels([*right, *wrong])
    cards = "".join(_card(look, number, pixels[number]) for number in (*right, *wrong) if number in pixels)
    caption = (
        f"{len(right)} images that are recognised and {len(wrong)} that are not, in a fixed random order, "
        "each of a class of its own where there are enough; as in figure 4 (left) of Krizhevsky et al. 2012. "
        "Bars: probabilities of the five most probable classes; the true class has a tick and a green bar. "
        f"{describe_look(look)}"
    )
    return figure(f"<div>{cards}</div>", caption, kind="cards")


def _of_various_classes(look: Look, order: NDArray[np.int64], count: int) -> list[int]:
    """The first images of an order, each of a class of its own as long as there are any."""
    labels = look.labels[order]
    firsts = np.sort(np.unique(labels, return_index=True)[1])
    others = np.setdiff1d(np.arange(len(order)), firsts)
    return [int(number) for number in order[np.concatenate((firsts, others))[:count]]]


def _card(look: Look, number: int, pixels_HWC: NDArray[np.uint8]) -> str:
    probabilities_C, label = look.probabilities[number], int(look.labels[number])
    best = rank_classes(probabilities_C[None], min(5, len(probabilities_C)))[0].tolist()
    bars = "".join(_bar(look, number, c, BLUE) for c in best)
    truth = look.truth(number)
    if label not in best:
        rank = rank_of(probabilities_C, label)
        bars += f"<p>✓ {text(truth)}: {probabilities_C[label]:.2%}, in place {rank:,}</p>"
    image = picture(pixels_HWC, f"validation image of class {truth}")
    return f'<div class="card">{image}<p><b>{text(truth)}</b><br>{text(look.name(number))}</p>{bars}</div>'


def _bar(look: Look, number: int, class_id: int, color: str) -> str:
    """The probability of one class of an image; that of the true class is green and marked."""
    share, true = float(look.probabilities[number, class_id]), class_id == look.labels[number]
    name = look.class_labels[class_id]
    return bar_row(name, share, f"{share:.1%}", color=GREEN if true else color, marked=bool(true))


def make_neighbours(look: Look) -> str:
    """Show images beside those that are nearest to them, as the paper's figure 4 on the right."""
    count = min(NUM_NEIGHBOURS, len(look.labels) - 1)
    if count < 1:
        return note("A single image has no neighbours.")
    nearest_NK, distances_NK = nearest(look.hidden, count)
    order = permutation_at(0, 2, len(look.labels))
    queries = _of_various_classes(look, order, NUM_QUERIES)
    numbers = [*queries, *(int(number) for query in queries for number in nearest_NK[query])]
    pixels = look.pixels(numbers)

    def cell(number: int, below: str, right: bool | None) -> str:
        tick = "" if right is None else "✓ " if right else "✗ "
        truth = look.truth(number)
        shown = picture(pixels[number], f"image of class {truth}") if number in pixels else ""
        return f"<td>{shown}{tick}{text(truth)}<br>{text(below)}</td>"

    lines = []
    for query in queries:
        cells = [cell(query, look.name(query).rpartition("/")[2], None)]
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
        f"{describe_look(look)}"
    )
    content = f'<div class="scroll"><table>{"".join(lines)}</table></div>'
    return figure(content, caption, kind="near")


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


def make_mistakes(look: Look) -> str:
    """Show the wrong predictions with the highest probability, and what in the picture spoke for them."""
    wrong = np.flatnonzero(~look.right)
    if not len(wrong):
        return f"<p>There is none. {text(describe_look(look))}</p>"
    sure = np.round(look.probabilities[wrong, look.found[wrong]].astype(np.float64), 4)
    chosen = [int(number) for number in wrong[np.argsort(-sure, kind="stable")][:NUM_MISTAKES]]
    pixels = look.pixels(chosen)
    cards, side = "", "a few"
    for number in (number for number in chosen if number in pixels):
        cam_HW = look.activation_map(pixels[number], int(look.found[number]))
        side = " × ".join(map(str, cam_HW.shape))
        cards += _mistake(look, number, pixels[number], cam_HW)
    caption = (
        f"The {len(chosen)} mistakes of which the model was most sure. Left: what it saw. Right: the more "
        "orange, the more this part speaks for the wrong class, by Grad-CAM (Selvaraju et al. 2017) on the "
        f"map of the last convolution, of {side} cells. (The plain class-activation map is not defined for "
        "AlexNet's three fully connected layers.) A grey picture: no part of it alone speaks for the "
        f"class. {describe_look(look)}"
    )
    return figure(f"<div>{cards}</div>", caption, kind="cards")


def _mistake(look: Look, number: int, pixels_HWC: NDArray[np.uint8], cam_HW: NDArray[np.float32]) -> str:
    found = int(look.found[number])
    shown = picture(pixels_HWC, f"validation image of class {look.truth(number)}")
    speaks = f"the same with the parts marked that speak for {look.class_labels[found]}"
    heat = picture(overlay(pixels_HWC, cam_HW), speaks)
    bars = "".join(_bar(look, number, class_id, ORANGE) for class_id in (found, int(look.labels[number])))
    return (
        f'<div class="card"><div class="pair">{shown}{heat}</div>{bars}<p>{text(look.name(number))}</p></div>'
    )


def overlay(pixels_HWC: NDArray[np.uint8], cam_HW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A grey picture with its activation map over it in orange.

    Args:
        pixels_HWC: the picture.
        cam_HW: of another size, 0..1; it is enlarged bilinearly.
    Returns:
        (H, W, 3) uint8.
    """
    height, width, _ = pixels_HWC.shape
    enlarged = Image.fromarray(cam_HW).resize((width, height), Image.Resampling.BILINEAR)
    share_HW1 = 0.7 * np.clip(np.asarray(enlarged, dtype=np.float32), 0, 1)[..., None]
    grey_HW1 = np.asarray(Image.fromarray(pixels_HWC).convert("L"), dtype=np.float32)[..., None]
    mixed = (1 - share_HW1) * grey_HW1 + share_HW1 * np.array(HEAT, dtype=np.float32)
    return np.rint(mixed).astype(np.uint8)
