"""Line charts: where points land, and what is left out."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

from infer.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Line, line_chart, ticks_between


def test_ticks_are_round_and_inside() -> None:
    assert ticks_between(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks_between(0.013, 0.031) == [0.015, 0.02, 0.025, 0.03]
    assert ticks_between(3, 3) == [3]


def drawn(lines: list[Line], *, log: bool = False) -> list[str]:
    chart = line_chart("Loss <b>", lines, x_label="epoch", y_label="nats", log=log)
    ElementTree.fromstring(chart)
    assert "Loss &lt;b&gt;" in chart and "<b>" not in chart
    return re.findall(r'<path d="([^"]*)" fill="none" stroke="red"', chart)


def test_points_land_where_their_values_are() -> None:
    (path,) = drawn([Line("x", [0, 2, 4], [0, 50, 100], "red")])
    places = [tuple(map(float, at.split())) for at in re.findall(r"[ML]([\d. ]+)", path)]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert (x0, x2) == (LEFT, WIDTH - RIGHT) and y0 == HEIGHT - BOTTOM
    assert math.isclose(x1, (x0 + x2) / 2, abs_tol=0.1) and math.isclose(y1, (y0 + y2) / 2, abs_tol=0.1)
    # the axis goes 5% above the largest value
    assert math.isclose(y2, TOP + (y0 - TOP) * 0.05 / 1.05, abs_tol=0.1)


def test_a_value_that_is_no_number_breaks_the_line() -> None:
    (path,) = drawn([Line("x", [1, 2, 3, 4, 5], [1, 2, math.nan, 2, 1], "red")])
    assert path.count("M") == 2 and path.count("L") == 2


def test_factors_of_ten_are_equal_steps_on_a_log_axis() -> None:
    (path,) = drawn([Line("x", [0, 1, 2], [0.1, 0.01, 0.001], "red")], log=True)
    y0, y1, y2 = (float(at.split()[1]) for at in re.findall(r"[ML]([\d. ]+)", path))
    assert math.isclose(y1 - y0, y2 - y1, abs_tol=0.2) and y0 < y1
