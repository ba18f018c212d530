"""Line charts as SVG, drawn by hand: a report has a handful, and needs no plotting library to be written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from infer.report.page import svg, text

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 70, 12, 46, 44
MAX_DOTTED = 30
"""Most points of a line that are marked by dots."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: in the legend; plain text.
        xs, ys: its points; the line is broken where y is NaN.
        color: of the line.
        dashed: whether it is.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    color: str
    dashed: bool = False


def ticks_between(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, at steps of 1, 2 or 5 times a power of ten.

    >>> ticks_between(0, 8.5)
    [0.0, 2.0, 4.0, 6.0, 8.0]
    """
    span = high - low
    if not span > 0:
        return [low]
    rough = span / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, lines: Sequence[Line], *, x_label: str, y_label: str, log: bool = False) -> str:
    """Draw lines over one axis.

    Args:
        title: plain text, as are the labels.
        lines: at least one point of each is finite.
        x_label, y_label: what the axes count, with units.
        log: whether the y axis is logarithmic, and all values above 0; else it begins at 0.
    """
    points = [(x, y) for line in lines for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
    scale = math.log10 if log else float
    xs, ys = [x for x, _ in points], [scale(y) for _, y in points]
    x_low, x_high = min(0.0, *xs), max(xs) or 1.0
    y_low, y_high = min(ys), max(ys)
    if not log:
        y_low = min(0.0, y_low)
    room = (y_high - y_low or abs(y_high) or 1.0) * 0.05
    y_high += room
    y_low -= room if log else 0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (scale(y) - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    y_ticks = _log_ticks(y_low, y_high) if log else ticks_between(y_low, y_high)
    parts = [f'<text x="{LEFT}" y="16" font-weight="600">{text(title)}</text>']
    parts += [_y_tick(tick, place(x_low, tick)[1]) for tick in y_ticks]
    parts += [_x_tick(tick, place(tick, y_ticks[0])[0]) for tick in ticks_between(x_low, x_high)]
    across, up = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts += [
        f'<text x="{across}" y="{HEIGHT - 8}" text-anchor="middle">{text(x_label)}</text>',
        f'<text transform="translate(14,{up}) rotate(-90)" text-anchor="middle">{text(y_label)}</text>',
    ]
    ends = []
    for number, line in enumerate(lines):
        line_points = list(zip(line.xs, line.ys, strict=True))
        places = [place(x, y) if math.isfinite(y) else None for x, y in line_points]
        parts += _draw(line, places, LEFT + 150 * number)
        last = next(y for y in reversed(line.ys) if math.isfinite(y))
        ends.append(f"{line.name} ends at {last:.4g}")
    return svg("".join(parts), f"{title}: {'; '.join(ends)}", WIDTH, HEIGHT, font_px=12)


def _draw(line: Line, places: Sequence[tuple[float, float] | None], legend_x: int) -> list[str]:
    """A line, with dots if it has few points, and its entry in the legend."""
    path, pen_is_up = "", True
    for at in places:
        if at is not None:
            path += f"{'M' if pen_is_up else 'L'}{at[0]:.1f} {at[1]:.1f}"
        pen_is_up = at is None
    dash = ' stroke-dasharray="5 3"' if line.dashed else ""
    drawn = [f'<path d="{path}" fill="none" stroke="{line.color}" stroke-width="1.8"{dash}/>']
    if len(places) <= MAX_DOTTED:
        drawn += [
            f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="2.5" fill="{line.color}"/>' for at in places if at
        ]
    return [
        *drawn,
        f'<path d="M{legend_x} 32h22" stroke="{line.color}" stroke-width="2"{dash}/>',
        f'<text x="{legend_x + 27}" y="36">{text(line.name)}</text>',
    ]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= math.log10(tick) <= high]
    whole = [tick for tick in inside if math.isclose(math.log10(tick), round(math.log10(tick)))]
    return whole if len(whole) >= 3 else inside or [10.0**high]


def _y_tick(tick: float, y: float) -> str:
    return (
        f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
    )


def _x_tick(tick: float, x: float) -> str:
    bottom = HEIGHT - BOTTOM
    return (
        f'<path d="M{x:.1f} {bottom}v4" stroke="#777"/>'
        f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{_number(tick)}</text>'
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
