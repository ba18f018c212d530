"""The confusion matrix as a heat map: its cells, its colours, and the order of many classes."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from infer.report.heat_map import COLORS, EMPTY_ROW, draw_heat_map, similar_first


def mixed_groups(size: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts of classes that are taken for others of their group; the groups are mixed."""
    generator = np.random.default_rng(0)
    groups = generator.permutation(size) // group
    chances = np.where(groups[:, None] == groups, 0.06, 0.003) + 0.5 * np.eye(size)
    rows = [generator.multinomial(50, row / row.sum()) for row in chances]
    return np.stack(rows).astype(np.int64), groups


def test_classes_that_are_confused_stand_together() -> None:
    confusion, groups = mixed_groups(64, 8)
    order = similar_first(confusion)
    assert sorted(order) == list(range(64))
    assert np.count_nonzero(np.diff(groups[order])) == 7


def test_groups_are_those_of_scipy() -> None:
    confusion, _ = mixed_groups(40, 8)
    shares = confusion / confusion.sum(axis=1, keepdims=True)
    distances = 10 - (shares + shares.T)
    np.fill_diagonal(distances, 0)
    trusted = fcluster(linkage(squareform(distances), "average"), 5, "maxclust")
    assert np.count_nonzero(np.diff(trusted[similar_first(confusion)])) == 4


def test_cells_have_their_place_colour_and_number() -> None:
    drawn = draw_heat_map(np.array([[3, 1, 0], [0, 50, 1], [0, 0, 0]]), ["a", "<b>", "c"])
    ElementTree.fromstring(drawn)
    paths = dict(reversed(pair) for pair in re.findall(r'<path d="(M[^"]*)" fill="(#\w+)"', drawn)[:5])
    assert paths[COLORS[7]] == "M30 30h30v30h-30z", "98% of the row"
    assert paths[COLORS[6]] == "M0 0h30v30h-30z", "75% of the row"
    assert paths[COLORS[4]] == "M30 0h30v30h-30z", "25% of the row"
    assert paths[COLORS[0]] == "M60 30h30v30h-30z", "2% of the row"
    assert paths[EMPTY_ROW] == "M0 60h90v30h-90z", "a class without images"
    assert re.findall(r'text-anchor="middle" fill="#\w+">(\d+)<', drawn) == ["3", "1", "50", "1"]
    assert "&lt;b&gt;" in drawn and "53 of 55 images on the diagonal" in drawn


@pytest.mark.parametrize("size", [200, 1000])
def test_many_classes_stay_small(size: int) -> None:
    generator = np.random.default_rng(0)
    confusion = np.diag(np.full(size, 25))
    np.add.at(confusion, tuple(generator.integers(0, size, (2, 25 * size))), 1)
    drawn = draw_heat_map(confusion, [f"class {number}" for number in range(size)])
    ElementTree.fromstring(drawn)
    assert len(drawn) < 1e6
    assert ("class 7<" in drawn) == (size == 200)
