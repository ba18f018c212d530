"""Top-1, top-5 and loss of a bundle on a labelled split, counted in integers and divided once."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import UserError
from data_pipeline.common.passed_over import log_passed_over
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset, open_recorded
from data_pipeline.loader import Loader
from data_pipeline.remote.shards import local_root
from data_pipeline.results.class_report import (
    ClassCounts,
    ClassReport,
    make_class_report,
    name_mistakes,
    rank_mistakes,
)
from infer.bundle.load import Bundle, data_of_run, open_bundle
from infer.predict.decode import fit_batch, open_decoder, run_valid
from infer.predict.rows import DEFAULT_BATCH, rank_classes
from infer.runtime.base import InferenceBackend
from infer.runtime.choose import DeviceName, choose_backend

log = logging.getLogger("infer")

TOP_K = 5


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """The result: `top1` and `top5` in 0..1 over `num_samples` images; `num_failed` failed."""

    top1: float
    top5: float
    loss: float
    num_samples: int
    num_failed: int


def evaluate_bundle(
    bundle: Bundle,
    backend: InferenceBackend,
    dataset: Dataset,
    *,
    batch_size: int = DEFAULT_BATCH,
    ten_crop: bool = False,
) -> tuple[Evaluation, ClassCounts, ClassReport]:
    """Run a bundle over a split, every image once; what it gets wrong is counted for each pair of classes.

    Args:
        bundle: a verified bundle.
        backend: the bundle, loaded.
        dataset: a split with the bundle's classes.
        batch_size: images in a batch; lowered, with a warning, to what the bundle takes.
        ten_crop: average the softmax of the paper's ten views of each image.
    Raises:
        UserError: other classes than the bundle's, or no image that could be read.
    """
    manifest = bundle.manifest
    if tuple(map(printable, dataset.classes)) != manifest.classes:
        raise UserError(
            f"{printable(dataset.root)}/{dataset.split} has other classes than the model "
            f"({len(dataset.classes)} and {len(manifest.classes)}): name its data with --data"
        )
    num_failed, loss_sum = 0, 0.0
    classes = _ClassCounter(len(manifest.classes))
    size = fit_batch(batch_size, backend.max_batch)
    with (
        open_decoder(manifest.preprocessing, size, backend=backend) as source,
        show_progress("evaluate", len(dataset)) as progress,
    ):
        loader = Loader(source, manifest.preprocessing)
        for batch in loader.eval(dataset, micro_batch=size, ten_crop=ten_crop):
            num_failed += len(batch.failures)
            progress.advance(len(batch))
            if not batch.valid.any():
                continue
            probabilities_NC, _ = run_valid(backend, batch, size)
            labels_N = batch.labels[batch.valid]
            classes.add(probabilities_NC, labels_N, batch.indices[batch.valid])
            true_N = probabilities_NC[np.arange(len(labels_N)), labels_N].astype(np.float64)
            # A probability that float32 rounds to 0 counts as the smallest that it can hold: a loss of 103.
            loss_sum -= float(np.log(np.maximum(true_N, np.finfo(np.float32).smallest_subnormal)).sum())
    counts = classes.counts
    num_samples = int(counts.confusion.sum())
    assert num_samples + num_failed == len(dataset), (num_samples, num_failed, len(dataset))
    if not num_samples:
        raise UserError(f"none of the {num_failed} images in {printable(dataset.root)} could be read")
    found = Evaluation(
        top1=int(np.trace(counts.confusion)) / num_samples,
        top5=int(counts.top5.sum()) / num_samples,
        loss=loss_sum / num_samples,
        num_samples=num_samples,
        num_failed=num_failed,
    )
    return found, counts, classes.report(dataset)


class _ClassCounter:
    """Counts for each pair of C classes, as `train.health.metrics.ClassMeter` does on a device."""

    def __init__(self, num_classes: int) -> None:
        zeros = np.zeros((num_classes, num_classes), dtype=np.int64)
        self.counts = ClassCounts(zeros, np.zeros(num_classes, dtype=np.int64))
        self._mistakes: list[tuple[float, int, int, int]] = []

    def add(
        self, probabilities_NC: NDArray[np.float32], labels_N: NDArray[np.int64], indices_N: NDArray[np.int64]
    ) -> None:
        ranked_NK = rank_classes(probabilities_NC, TOP_K)
        found_N = ranked_NK[:, 0]
        np.add.at(self.counts.confusion, (labels_N, found_N), 1)
        np.add.at(self.counts.top5, labels_N, (ranked_NK == labels_N[:, None]).any(axis=1))
        wrong = np.flatnonzero(found_N != labels_N)
        sure = probabilities_NC[wrong, found_N[wrong]]
        columns = (sure, indices_N[wrong], labels_N[wrong], found_N[wrong])
        self._mistakes += zip(*(column.tolist() for column in columns), strict=True)
        self._mistakes = rank_mistakes(self._mistakes)

    def report(self, dataset: Dataset) -> ClassReport:
        names = tuple(map(printable, dataset.classes))
        mistakes = name_mistakes(self._mistakes, names, lambda index: printable(dataset.name_at(index)))
        return make_class_report(self.counts, names, tuple(map(printable, dataset.class_labels)), mistakes)


def evaluate_exported(
    path: Path, data: Path | None, *, split: str, device: DeviceName, ten_crop: bool = False
) -> tuple[Evaluation, ClassCounts, ClassReport]:
    """Loss, top-1 and top-5 of a bundle, and what it gets wrong.

    Args:
        path: the bundle.
        data: folder with the split; None for the data of the run that the bundle lies in.
        split: which folder of the data.
        device: see `infer.runtime.choose.choose_backend`.
        ten_crop: see `evaluate_bundle`.
    Raises:
        UserError: no data, or other classes than the bundle's.
    """
    bundle = open_bundle(path)
    root = local_root(data or data_of_run(bundle), [split])
    dataset = open_dataset(root, split) if data else open_recorded(root, split)
    log_passed_over(dataset.split, dataset.passed_over)
    backend, runs_on = choose_backend(bundle, device=device)
    with closing(backend):
        log.info(f"runs on: {runs_on}")
        return evaluate_bundle(bundle, backend, dataset, ten_crop=ten_crop)
