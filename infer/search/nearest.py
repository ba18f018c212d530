"""Nearest neighbours by cosine similarity, over blocks of rows: exact, by comparison with every row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from infer.search.read import Block

# Shapes: Q queries, N rows of a block, D features, K nearest.


class Nearest(NamedTuple):
    """The nearest rows of each query, the nearest first; fewer than asked for where there are no more.

    Attributes:
        rows: (Q, K), their numbers.
        similarities: (Q, K), cosine similarities, -1..1; of features behind a ReLU, 0..1.
        num_rows, num_unreadable: rows that were compared, and those without features.
    """

    rows: NDArray[np.int64]
    similarities: NDArray[np.float32]
    num_rows: int
    num_unreadable: int


def find_nearest(queries_QD: NDArray[np.float32], blocks: Iterable[Block], top: int) -> Nearest:
    """Find the rows that are nearest to each query.

    A row of zeros has similarity 0 to everything. Of equal similarities the earlier row comes first; they are
    computed in float64 and compared in float32, so that equal rows are equal wherever they stand in a block.

    Args:
        queries_QD: their features.
        blocks: the rows to compare with, in order.
        top: K, at least 1.
    """
    unit_QD = _unit(queries_QD)
    rows_QK = np.empty((len(unit_QD), 0), np.int64)
    similarities_QK = np.empty((len(unit_QD), 0), np.float32)
    num_rows = num_unreadable = 0
    for first, block_ND in blocks:
        there_N = np.flatnonzero(np.isfinite(block_ND).all(axis=1))
        found_QN = (unit_QD @ _unit(block_ND[there_N]).T).astype(np.float32)
        rows_QN = np.broadcast_to(first + there_N, found_QN.shape)
        similarities = np.concatenate([similarities_QK, found_QN], axis=1)
        order_QK = np.argsort(-similarities, axis=1, kind="stable")[:, :top]
        rows_QK = np.take_along_axis(np.concatenate([rows_QK, rows_QN], axis=1), order_QK, axis=1)
        similarities_QK = np.take_along_axis(similarities, order_QK, axis=1)
        num_rows += len(there_N)
        num_unreadable += len(block_ND) - len(there_N)
    return Nearest(rows_QK, similarities_QK, num_rows, num_unreadable)


def _unit(vectors_ND: NDArray[np.float32]) -> NDArray[np.float64]:
    """Vectors of length 1 with the same directions; zeros stay zeros."""
    wide_ND = vectors_ND.astype(np.float64)
    length_N1 = np.linalg.norm(wide_ND, axis=1, keepdims=True)
    return wide_ND / np.where(length_N1 > 0, length_N1, 1)
