"""Nearest neighbours in blocks, compared with a brute force of NumPy over all rows at once."""

from __future__ import annotations

import numpy as np
import pytest

from infer.search.nearest import find_nearest
from infer.search.read import Block


@pytest.mark.parametrize("size", [1, 7, 100])
def test_nearest_rows_are_those_of_a_brute_force(size: int) -> None:
    random = np.random.default_rng(0)
    rows = np.maximum(random.normal(size=(60, 16)), 0).astype(np.float32)
    rows[[3, 40, 59]] = rows[17]  # equal rows, in several blocks and places
    rows[5], rows[23] = np.nan, 0
    queries = np.stack([rows[17] * 2, random.random(16, np.float32)])
    found = find_nearest(queries, [Block(at, rows[at : at + size]) for at in range(0, 60, size)], 6)
    cosines = np.array([
        [-2 if i == 5 else 0 if i == 23 else float(np.dot(q, r) / np.linalg.norm(q) / np.linalg.norm(r))
         for i, r in enumerate(rows.astype(np.float64))] for q in queries.astype(np.float64)
    ])  # fmt: skip
    expected = np.argsort(-cosines.astype(np.float32), axis=1, kind="stable")[:, :6]
    assert found.rows.tolist() == expected.tolist()
    assert found.rows[0, :4].tolist() == [3, 17, 40, 59] and found.similarities[0, 3] == 1
    np.testing.assert_allclose(found.similarities, np.take_along_axis(cosines, expected, 1), atol=1e-6)
    assert (found.num_rows, found.num_unreadable) == (59, 1)


def test_fewer_rows_than_asked_for_are_all_there_are() -> None:
    rows = np.array([[0, 0], [1, 0], [1, 1]], np.float32)
    found = find_nearest(np.array([[0, 2]], np.float32), [Block(0, rows)], 5)
    assert found.rows.tolist() == [[2, 0, 1]] and found.similarities[0].tolist() == pytest.approx(
        [2**-0.5, 0, 0]
    )
    assert find_nearest(np.ones((1, 2), np.float32), [], 5).rows.shape == (1, 0)
