"""The confusion matrix as a heat map of SVG that is readable for ten classes and for two hundred.

Shapes: C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from infer.report.page import svg, text

MAX_NUMBERED = 30
"""Up to so many classes each cell has its count."""
MAX_LABELLED = 300
"""Up to so many classes rows and columns have names."""
EDGES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""A cell's share of its row decides its colour: above the first edge the first colour, and so on."""
COLORS = ("#deebf7", "#c6dbef", "#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08519c", "#08306b")
DARK_FROM = 4
"""From which colour on numbers are white."""
EMPTY_ROW = "#eeeeee"
MAX_LABEL = 22
LEGEND_PX = 34


def similar_first(confusion: NDArray[np.int64]) -> list[int]:
    """Order classes so that those that are taken for each other stand side by side.

    The two groups that are most similar are joined until one is left, each time with their two most similar
    ends together. Two groups are as similar as their classes are on average (average linkage), two classes as
    the shares of both that are taken for the other.

    Args:
        confusion: (C, C) counts, true classes in rows.
    Returns:
        A permutation of the classes.
    """
    shares_CC = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    similar_CC = shares_CC + shares_CC.T
    between_CC, sizes_C = similar_CC.copy(), np.ones(len(confusion))
    np.fill_diagonal(between_CC, -np.inf)
    groups = [[place] for place in range(len(confusion))]
    for _ in range(len(confusion) - 1):
        mean_CC = between_CC / np.outer(sizes_C, sizes_C)
        first, second = sorted(divmod(int(mean_CC.argmax()), len(confusion)))
        groups[first] = _joined(groups[first], groups[second], similar_CC)
        between_CC[first] += between_CC[second]
        between_CC[:, first] = between_CC[first]
        between_CC[second] = between_CC[:, second] = between_CC[first, first] = -np.inf
        sizes_C[first] += sizes_C[second]
    return groups[0]


def _joined(one: list[int], other: list[int], similar_CC: NDArray[np.float64]) -> list[int]:
    ways = [a + b for a in (one, one[::-1]) for b in (other, other[::-1])]
    return max(ways, key=lambda way: similar_CC[way[len(one) - 1], way[len(one)]])


def draw_heat_map(confusion: NDArray[np.int64], labels: list[str]) -> str:
    """Draw counts as cells: one path for each colour, so that 40,000 cells stay small.

    Args:
        confusion: (C, C) counts, true classes in rows, in the order to draw.
        labels: of the classes; plain text.
    """
    size = len(labels)
    numbered, labelled = size <= MAX_NUMBERED, size <= MAX_LABELLED
    cell, font = (30, 12) if numbered else (9, 8) if labelled else (2, 8)
    names = [name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 1]}…" for name in labels]
    longest = max(map(len, names))
    margin = int(longest * font * 0.6) + 30 if labelled else 24
    side = margin + size * cell
    totals = confusion.sum(axis=1, keepdims=True)
    shares = confusion / np.maximum(totals, 1)
    levels = np.searchsorted(EDGES, shares, side="left") - 1  # -1 where nothing was counted
    parts = [_cells(levels == level, cell, color) for level, color in enumerate(COLORS)]
    parts += [_cells(np.broadcast_to(totals == 0, shares.shape), cell, EMPTY_ROW)]
    if numbered:
        parts += [
            f'<text x="{x * cell + cell / 2:g}" y="{y * cell + cell / 2 + 4:g}" text-anchor="middle" '
            f'fill="{"#fff" if levels[y, x] >= DARK_FROM else "#1a1a1a"}">{confusion[y, x]}</text>'
            for y, x in np.argwhere(confusion > 0)
        ]
    parts.append(f'<path d="M0 0h{size * cell}v{size * cell}h-{size * cell}z" fill="none" stroke="#777"/>')
    if labelled:
        for place, name in enumerate(names):
            middle = place * cell + cell / 2 + font / 3
            parts.append(f'<text x="-5" y="{middle:g}" text-anchor="end">{text(name)}</text>')
            parts.append(f'<text transform="translate({middle:g},-5) rotate(-90)">{text(name)}</text>')
    middle = size * cell / 2
    beside = 12 - margin
    parts += [
        f'<text x="{middle:g}" y="{beside}" text-anchor="middle" font-size="12">taken for</text>',
        f'<text transform="translate({beside},{middle:g}) rotate(-90)" text-anchor="middle" font-size="12">'
        "true class</text>",
    ]
    right = f"{np.trace(confusion):,} of {confusion.sum():,} images on the diagonal"
    high, wide = side + LEGEND_PX, max(side + 8, margin + 380)
    content = (
        f'<g transform="translate({margin},{margin})">{"".join(parts)}</g>'
        f'<g transform="translate({margin},{side + 8})" font-size="11">{_legend()}</g>'
    )
    return svg(content, f"confusion matrix of {size} classes; {right}", wide, high, font_px=font)


def _cells(chosen: NDArray[np.bool_], cell: int, color: str) -> str:
    """The cells of one colour as one path; neighbours in a row are one rectangle."""
    steps = []
    for y in np.flatnonzero(chosen.any(axis=1)):
        row = np.concatenate(([False], chosen[y], [False])).astype(np.int8)
        change = np.diff(row)
        for start, stop in zip(np.flatnonzero(change > 0), np.flatnonzero(change < 0), strict=True):
            width = (stop - start) * cell
            steps.append(f"M{start * cell} {y * cell}h{width}v{cell}h-{width}z")
    return f'<path d="{"".join(steps)}" fill="{color}"/>' if steps else ""


def _legend() -> str:
    parts = ['<text x="0" y="14">share of the row, above</text>']
    for number, (edge, color) in enumerate(zip(EDGES, COLORS, strict=True)):
        x = 136 + 30 * number
        parts.append(
            f'<path d="M{x} 4h30v10h-30z" fill="{color}"/><text x="{x}" y="25">{edge * 100:g}%</text>'
        )
    return "".join(parts)
