"""Search a file of features for the images that are nearest to some others.

Nearest by cosine similarity, over blocks of rows: exact, by comparison with every row.
Shapes: Q queries, N rows of a block, D features, K nearest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable
from infer.bundle.load import Bundle, exports_under, find_bundle, load_bundle
from infer.bundle.manifest import read_digest
from infer.predict.feature_files import FeatureInfo
from infer.predict.inputs import Inputs, find_inputs
from infer.predict.rows import ErrorRow, FeatureRow
from infer.predictor import Predictor
from infer.search.read import Block, open_feature_file

log = logging.getLogger("infer")


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """An image of a file of features: its row there, and its cosine similarity to the query."""

    path: str
    row: int
    similarity: float


class QueryResult(msgspec.Struct, frozen=True, kw_only=True):
    """The images that are nearest to a query, the nearest first."""

    path: str
    nearest: tuple[Neighbour, ...]


class SearchResult(msgspec.Struct, frozen=True, kw_only=True):
    """The results of all queries.

    Attributes:
        network, layer: whose features were compared.
        num_images, num_unreadable: images that were compared, and rows of the file without features.
    """

    network: str
    layer: str
    similarity: str = "cosine"
    num_images: int
    num_unreadable: int
    queries: tuple[QueryResult, ...]


def search_images(paths: Sequence[str], features: Path, *, model: Path | None, top: int) -> SearchResult:
    """Find the images whose features are nearest to those of the queries, with the model that made the file.

    Args:
        paths: the queries, as `infer.predict.inputs.find_inputs` takes them.
        features: a file that `alexnet predict --features` wrote.
        model: the bundle; None to find it under runs/ by the hash in the file.
        top: nearest images of each query.
    Raises:
        UserError: a damaged file, or one of another model; no such model; a query that cannot be read.
    """
    if top < 1:
        raise UserError(f"--top {top}: at least 1")
    inputs = find_inputs(paths)
    file = open_feature_file(features)
    bundle = _find_model(model, file.info, features)
    names, queries_QD = _query_features(inputs, bundle, file.info)
    found = find_nearest(queries_QD, file.blocks(), top)
    by_row = file.paths_of(set(found.rows.ravel().tolist()))
    return SearchResult(
        network=file.info.network,
        layer=file.info.layer,
        num_images=found.num_rows,
        num_unreadable=found.num_unreadable,
        queries=tuple(
            QueryResult(
                path=name,
                nearest=tuple(
                    Neighbour(path=by_row[row], row=row, similarity=similarity)
                    for row, similarity in zip(rows_K.tolist(), similarities_K.tolist(), strict=True)
                ),
            )
            for name, rows_K, similarities_K in zip(names, found.rows, found.similarities, strict=True)
        ),
    )


def _find_model(model: Path | None, info: FeatureInfo, features: Path) -> Bundle:
    """The verified bundle that made a file of features.

    Raises:
        UserError: the one that was named is another, or it is not under runs/.
    """
    digest = info.bundle_sha256
    made_by = f"{printable(features)} was made by the bundle with manifest SHA-256 {digest[:12]}…"
    if model is None:
        folder = next((path for path in exports_under(Path("runs")) if _digest(path) == digest), None)
        if folder is None:
            raise UserError(f"{made_by}, which is not under runs/: name it with --model")
    else:
        folder = find_bundle(model)
        if _digest(folder) != digest:
            raise UserError(f"{made_by}, and {printable(folder)} is another: name that one with --model")
    bundle = load_bundle(folder)
    log.info(f"model: {bundle.folder}")
    manifest = bundle.manifest
    if (manifest.feature_layer, manifest.num_features) != (info.layer, info.num_features):
        raise UserError(f"{printable(features)} names other features than its bundle, {printable(folder)}")
    return bundle


def _digest(folder: Path) -> str | None:
    """The digest in a bundle's manifest; None if it cannot be read."""
    try:
        return read_digest(folder)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError):
        return None


def _query_features(
    inputs: Inputs, bundle: Bundle, info: FeatureInfo
) -> tuple[list[str], NDArray[np.float32]]:
    """The names of the queries, and their features (Q, D)."""
    names, features = [], []
    with Predictor(bundle, features=info.layer, ten_crop=info.ten_crop, expected=inputs.total) as predictor:
        log.info(f"runs on: {predictor.runs_on}")
        for row in predictor(inputs):
            if isinstance(row, ErrorRow):
                raise UserError(f"{row.path} cannot be read: {row.error}")
            assert isinstance(row, FeatureRow)
            names.append(row.path)
            features.append(row.features)
    if not names:
        raise UserError("the lists and shards that were given name no images")
    return names, np.stack(features)


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
