"""Measure how far models agree on real images. Imports neither torch nor train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import GateError, UserError
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loader import Loader
from infer.bundle.gate_report import LIMITS, Agreement, Limits
from infer.bundle.manifest import Manifest
from infer.predict.decode import open_decoder, valid_images
from infer.runtime.base import Outputs

# Shapes: N images, C classes, D features, K the five best.

MAX_IMAGES = 1000
MAX_GATE_BATCH = 32
TOP_K = 5

Runner = Callable[[NDArray[np.uint8]], Outputs]


@dataclass(frozen=True)
class Comparison:
    """Agreement of several models with a reference, on the same images; accuracies and shares in 0..1.

    Attributes:
        num_images, num_failed: images compared, and images that could not be read.
        num_available: size of the split.
        reference_accuracy: None where the images have no labels.
        agreements: by the candidate's name.
    """

    num_images: int
    num_failed: int
    num_available: int
    reference_accuracy: float | None
    agreements: dict[str, Agreement]


def compare(
    reference: Runner, candidates: Mapping[str, Runner], dataset: Dataset, manifest: Manifest
) -> Comparison:
    """Run a reference and its candidates on the same decoded images: all, or 1,000 spread over the split.

    Where a candidate's best class differs from the reference's, but their probabilities by the reference
    differ by no more than `Limits.tie_margin` (twice the difference that a probability may have), that is a
    tie: it counts as agreement, and in `num_ties`. The same goes for the edge of the five best.

    Args:
        reference: the model whose probabilities and features are taken as right.
        candidates: the models to compare with it, by name.
        dataset: images; without classes, they have no labels, and all accuracies are None.
        manifest: the preprocessing, the precision and the largest batch of all of them.
    Raises:
        GateError: a probability or feature that is not a number.
        UserError: not one image could be read.
    """
    sample = sample_evenly(dataset, MAX_IMAGES)
    labels: list[NDArray[np.int64]] = []
    expected: list[Outputs] = []
    found: dict[str, list[Outputs]] = {name: [] for name in candidates}
    num_failed = 0
    preprocessing, size = manifest.preprocessing, min(manifest.max_batch, MAX_GATE_BATCH)
    with open_decoder(preprocessing, size) as decoder, show_progress("gate", len(sample)) as progress:
        for batch in Loader(decoder, preprocessing).eval(sample, micro_batch=size):
            num_failed += len(batch.failures)
            progress.advance(len(batch))
            if not batch.valid.any():
                continue
            images_NHWC = valid_images(batch)
            labels.append(batch.labels[batch.valid])
            expected.append(reference(images_NHWC))
            for name, run in candidates.items():
                found[name].append(run(images_NHWC))
    if not labels:
        raise UserError(
            f"none of the {num_failed} validation images in {printable(dataset.root)} could be read"
        )
    right = _joined(expected)
    labels_N, limits = np.concatenate(labels) if dataset.classes else None, LIMITS[manifest.precision]
    agreements = {}
    for name, outputs in found.items():
        given = _joined(outputs)
        agreements[name] = replace(
            measure_agreement(right.probabilities, given.probabilities, labels_N, limits),
            max_feature_difference=feature_difference(right.features, given.features),
        )
    return Comparison(
        num_images=len(right.probabilities),
        num_failed=num_failed,
        num_available=len(dataset),
        reference_accuracy=None if labels_N is None else _share(right.probabilities.argmax(1) == labels_N),
        agreements=agreements,
    )


def _joined(batches: list[Outputs]) -> Outputs:
    features = [batch.features for batch in batches if batch.features is not None]
    probabilities_NC = np.concatenate([batch.probabilities for batch in batches])
    return Outputs(probabilities_NC, np.concatenate(features) if features else None)


def feature_difference(
    expected_ND: NDArray[np.float32] | None, found_ND: NDArray[np.float32] | None
) -> float | None:
    """The largest difference of any feature as a share of the reference's largest one; None without features.

    Raises:
        GateError: a feature that is not a number, or a reference whose features are all 0.
    """
    if expected_ND is None or found_ND is None:
        return None
    if not (np.isfinite(expected_ND).all() and np.isfinite(found_ND).all()):
        raise GateError("gate: features that are not finite; nothing was shipped")
    if not (largest := float(np.abs(expected_ND).max())):
        raise GateError("gate: every feature of the checkpoint is 0 on every image; nothing was shipped")
    return float(np.abs(expected_ND - found_ND).max()) / largest


def sample_evenly(dataset: Dataset, limit: int) -> Dataset:
    """The dataset, or `limit` of its samples at even distances, so that every class has its share."""
    if len(dataset) <= limit:
        return dataset
    chosen = np.arange(limit, dtype=np.int64) * len(dataset) // limit
    return dataset.take(chosen)


def measure_agreement(
    expected_NC: NDArray[np.float32],
    found_NC: NDArray[np.float32],
    labels_N: NDArray[np.int64] | None,
    limits: Limits,
) -> Agreement:
    """Compare the probabilities of a candidate with the reference's.

    Args:
        expected_NC, found_NC: by the reference and by the candidate.
        labels_N: the true classes; None where they are unknown.
        limits: the margins decide what is a tie.
    Raises:
        GateError: a probability that is not a number, from either side.
    """
    for what, values in (("the checkpoint", expected_NC), ("the export", found_NC)):
        if not np.isfinite(values).all():
            raise GateError(f"gate: {what} gives probabilities that are not finite; nothing was shipped")
    margin = limits.tie_margin
    edge_margin = margin if limits.top5_margin is None else limits.top5_margin
    rows_N = np.arange(len(expected_NC))
    expected_N, found_N = expected_NC.argmax(1), found_NC.argmax(1)
    same_N = expected_N == found_N
    gap_N = expected_NC[rows_N, expected_N] - expected_NC[rows_N, found_N]
    tied_N = ~same_N & (margin > 0) & (gap_N <= margin)
    k = min(TOP_K, expected_NC.shape[1])
    edge_N = np.sort(expected_NC, axis=1)[:, -k]
    found_NK = np.argpartition(found_NC, -k, axis=1)[:, -k:]
    among_NK = np.take_along_axis(expected_NC, found_NK, axis=1) >= edge_N[:, None] - edge_margin
    difference_NC = np.abs(expected_NC.astype(np.float64) - found_NC)
    return Agreement(
        top1_agreement=_share(same_N | tied_N),
        top5_agreement=_share(np.logical_and.reduce(among_NK, axis=1)),
        num_ties=int(tied_N.sum()),
        max_probability_difference=float(difference_NC.max()),
        mean_probability_difference=float(difference_NC.mean()),
        accuracy=None if labels_N is None else _share(found_N == labels_N),
    )


def _share(hits_N: NDArray[np.bool_]) -> float:
    """The share of images, counted in integers and divided once."""
    return int(hits_N.sum()) / len(hits_N)
