"""How far two models agree on real images, and how far they must. Imports neither torch nor train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import GateError, UserError
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loader import Loader
from data_pipeline.transforms.preprocessing import Preprocessing
from infer.bundle.manifest import Agreement, Limits
from infer.predict.decode import open_decoder, valid_images

# Shapes: N images, C classes, K the five best.

MAX_IMAGES = 1000
MAX_GATE_BATCH = 32
TOP_K = 5

Probabilities = NDArray[np.float32]
Runner = Callable[[NDArray[np.uint8]], Probabilities]


@dataclass(frozen=True)
class Comparison:
    """What came of running several models on the same images; accuracies and shares in 0..1."""

    num_images: int
    num_failed: int
    num_available: int
    reference_accuracy: float
    agreements: dict[str, Agreement]


def compare(
    reference: Runner,
    candidates: Mapping[str, Runner],
    dataset: Dataset,
    preprocessing: Preprocessing,
    limits: Limits,
    max_batch: int,
) -> Comparison:
    """Run a reference and its candidates on the same decoded images: all, or 1,000 spread over the split.

    Where a candidate's best class differs from the reference's, but the reference holds both to be equal
    within `Limits.tie_margin` (twice the difference that a probability may have), that is a tie: it counts
    as agreement, and is counted in `num_ties`. The same goes for the edge of the five best.

    Args:
        reference: what is held to be right.
        candidates: what is judged, by name.
        dataset: labelled images.
        preprocessing: the contract of all of them.
        limits: of these only the margins are used here.
        max_batch: largest batch that all of them take.
    Raises:
        GateError: a probability that is not a number.
        UserError: not one image could be read.
    """
    sample = spread(dataset, MAX_IMAGES)
    tallies = {name: Tally(limits) for name in candidates}
    num_images = num_correct = num_failed = 0
    size = min(max_batch, MAX_GATE_BATCH)
    with open_decoder(preprocessing, size) as decoder, show_progress("gate", len(sample)) as progress:
        for batch in Loader(decoder, preprocessing).eval(sample, micro_batch=size):
            images_NHWC, labels_N = valid_images(batch), batch.labels[batch.valid]
            num_failed += len(batch.failures)
            progress.advance(len(batch))
            if not len(labels_N):
                continue
            expected_NC = reference(images_NHWC)
            num_images += len(labels_N)
            num_correct += int((expected_NC.argmax(1) == labels_N).sum())
            for name, run in candidates.items():
                tallies[name].add(expected_NC, run(images_NHWC), labels_N)
    if not num_images:
        raise UserError(
            f"none of the {num_failed} validation images in {printable(dataset.root)} could be read"
        )
    return Comparison(
        num_images=num_images,
        num_failed=num_failed,
        num_available=len(dataset),
        reference_accuracy=num_correct / num_images,
        agreements={name: tally.agreement() for name, tally in tallies.items()},
    )


def spread(dataset: Dataset, limit: int) -> Dataset:
    """The dataset, or `limit` of its samples spread evenly, so that every class has its share."""
    if len(dataset) <= limit:
        return dataset
    chosen = np.arange(limit, dtype=np.int64) * len(dataset) // limit
    return dataset.take(chosen)


class Tally:
    """Running comparison of one artefact with the reference."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.num_images = self.num_values = 0
        self.top1 = self.top5 = self.ties = self.correct = 0
        self.largest = self.total = 0.0

    def add(self, expected_NC: Probabilities, found_NC: Probabilities, labels_N: NDArray[np.int64]) -> None:
        """Count one batch.

        Raises:
            GateError: a probability that is not a number, from either side.
        """
        for what, values in (("the checkpoint", expected_NC), ("the export", found_NC)):
            if not np.isfinite(values).all():
                raise GateError(f"gate: {what} gives probabilities that are not finite; nothing was shipped")
        margin = self.limits.tie_margin
        edge_margin = margin if self.limits.top5_margin is None else self.limits.top5_margin
        rows_N = np.arange(len(labels_N))
        expected_N, found_N = expected_NC.argmax(1), found_NC.argmax(1)
        same_N = expected_N == found_N
        tied_N = (
            ~same_N
            & (margin > 0)
            & (expected_NC[rows_N, expected_N] - expected_NC[rows_N, found_N] <= margin)
        )
        k = min(TOP_K, expected_NC.shape[1])
        edge_N = np.sort(expected_NC, axis=1)[:, -k]
        found_NK = np.argpartition(found_NC, -k, axis=1)[:, -k:]
        among_NK = np.take_along_axis(expected_NC, found_NK, axis=1) >= edge_N[:, None] - edge_margin
        difference_NC = np.abs(expected_NC.astype(np.float64) - found_NC)
        self.num_images += len(labels_N)
        self.num_values += difference_NC.size
        self.top1 += int((same_N | tied_N).sum())
        self.ties += int(tied_N.sum())
        self.top5 += int(among_NK.all(axis=1).sum())
        self.correct += int((found_N == labels_N).sum())
        self.largest = max(self.largest, float(difference_NC.max()))
        self.total += float(difference_NC.sum())

    def agreement(self) -> Agreement:
        """The counts as shares and means, divided once."""
        return Agreement(
            top1_agreement=self.top1 / self.num_images,
            top5_agreement=self.top5 / self.num_images,
            num_ties=self.ties,
            max_probability_difference=self.largest,
            mean_probability_difference=self.total / self.num_values,
            accuracy=self.correct / self.num_images,
        )
