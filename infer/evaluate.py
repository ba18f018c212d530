"""Top-1, top-5 and loss of a bundle on a labelled split, counted in integers and divided once."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np

from data_pipeline.common.console import show_progress
from data_pipeline.common.errors import UserError
from data_pipeline.common.passed_over import log_passed_over
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset, open_recorded
from data_pipeline.loader import Loader
from data_pipeline.remote.shards import local_root
from infer.bundle.load import Bundle, data_of_run, open_bundle
from infer.predict.decode import decoding_device, fit_batch, open_decoder, run_valid
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
) -> Evaluation:
    """Run a bundle over a split, every image once.

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
    num_samples = num_top1 = num_top5 = num_failed = 0
    loss_sum = 0.0
    size = fit_batch(batch_size, backend.max_batch)
    with (
        open_decoder(manifest.preprocessing, size, device=decoding_device(backend, "auto")) as source,
        show_progress("evaluate", len(dataset)) as progress,
    ):
        loader = Loader(source, manifest.preprocessing)
        for batch in loader.eval(dataset, micro_batch=size, ten_crop=ten_crop):
            probabilities_NC, labels_N = run_valid(backend, batch, size), batch.labels[batch.valid]
            hits_NK = rank_classes(probabilities_NC, TOP_K) == labels_N[:, None]
            true_N = probabilities_NC[np.arange(len(labels_N)), labels_N].astype(np.float64)
            num_samples += len(labels_N)
            num_top1 += int(hits_NK[:, :1].sum())
            num_top5 += int(hits_NK.sum())
            # A probability that float32 rounds to 0 counts as the smallest that it can hold: a loss of 103.
            loss_sum -= float(np.log(np.maximum(true_N, np.finfo(np.float32).smallest_subnormal)).sum())
            num_failed += len(batch.failures)
            progress.advance(len(batch))
    assert num_samples + num_failed == len(dataset), (num_samples, num_failed, len(dataset))
    if not num_samples:
        raise UserError(f"none of the {num_failed} images in {printable(dataset.root)} could be read")
    return Evaluation(
        top1=num_top1 / num_samples,
        top5=num_top5 / num_samples,
        loss=loss_sum / num_samples,
        num_samples=num_samples,
        num_failed=num_failed,
    )


def evaluate_exported(
    path: Path, data: Path | None, *, split: str, device: DeviceName, ten_crop: bool = False
) -> Evaluation:
    """Loss, top-1 and top-5 of a bundle.

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
    choice = choose_backend(bundle, device=device)
    with closing(choice.backend):
        log.info(f"runs on: {choice.sentence}")
        return evaluate_bundle(bundle, choice.backend, dataset, ten_crop=ten_crop)
