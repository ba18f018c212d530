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
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset
from data_pipeline.loader import Loader
from infer.bundle.load import Bundle, find_bundle, load_bundle
from infer.predict.decode import DecoderName, decoding_device, fit_batch, open_decoder, run_valid
from infer.runtime.base import InferenceBackend
from infer.runtime.choose import DeviceName, choose_backend

log = logging.getLogger("infer")

TOP_K = 5
DEFAULT_BATCH = 32


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What a split came to: `top1` and `top5` in 0..1 over `num_samples` images; unreadable ones apart."""

    top1: float
    top5: float
    loss: float
    num_samples: int
    num_failed: int


class _Counts:
    """Integer counts, and the sum of the losses."""

    def __init__(self) -> None:
        self.samples = self.top1 = self.top5 = 0
        self.loss_sum = 0.0

    def add(self, probabilities_NC: NDArray[np.float32], labels_N: NDArray[np.int64]) -> None:
        k = min(TOP_K, probabilities_NC.shape[1])
        # Stable, so that of equal probabilities the lower class comes first, on every machine.
        ranked_NK = np.argsort(-probabilities_NC, axis=1, kind="stable")[:, :k]
        hits_NK = ranked_NK == labels_N[:, None]
        true_N = probabilities_NC[np.arange(len(labels_N)), labels_N].astype(np.float64)
        self.samples += len(labels_N)
        self.top1 += int(hits_NK[:, 0].sum())
        self.top5 += int(hits_NK.sum())
        # A probability that float32 rounds to 0 counts as the smallest that it can hold: a loss of 103.
        self.loss_sum -= float(np.log(np.maximum(true_N, np.finfo(np.float32).smallest_subnormal)).sum())


def evaluate_bundle(
    bundle: Bundle,
    backend: InferenceBackend,
    dataset: Dataset,
    *,
    batch_size: int = DEFAULT_BATCH,
    decoder: DecoderName = "auto",
    ten_crop: bool = False,
) -> Evaluation:
    """Run a bundle over a split, every image once.

    Args:
        bundle: a verified bundle.
        backend: it, loaded.
        dataset: a split with the bundle's classes.
        batch_size: images a batch; lowered, with a warning, to what the bundle takes.
        decoder: who decodes.
        ten_crop: judge each image by the mean probabilities of the paper's ten views.
    Raises:
        UserError: other classes than the bundle's, or not one image that could be read.
    """
    manifest = bundle.manifest
    if tuple(map(printable, dataset.classes)) != manifest.classes:
        raise UserError(
            f"{printable(dataset.root)}/{dataset.split} has other classes than the model "
            f"({len(dataset.classes)} and {len(manifest.classes)}): name its data with --data"
        )
    counts, num_failed = _Counts(), 0
    size = fit_batch(batch_size, backend.max_batch)
    with (
        open_decoder(manifest.preprocessing, size, decoder, decoding_device(backend, decoder)) as source,
        show_progress("evaluate", len(dataset)) as progress,
    ):
        loader = Loader(source, manifest.preprocessing)
        for batch in loader.eval(dataset, micro_batch=size, ten_crop=ten_crop):
            if batch.valid.any():
                counts.add(run_valid(backend, batch, size), batch.labels[batch.valid])
            num_failed += len(batch.failures)
            progress.advance(len(batch))
    assert counts.samples + num_failed == len(dataset), (counts.samples, num_failed, len(dataset))
    if not counts.samples:
        raise UserError(f"none of the {num_failed} images in {printable(dataset.root)} could be read")
    return Evaluation(
        top1=counts.top1 / counts.samples,
        top5=counts.top5 / counts.samples,
        loss=counts.loss_sum / counts.samples,
        num_samples=counts.samples,
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
    bundle = load_bundle(find_bundle(path))
    root = data or data_of_run(bundle)
    dataset = open_dataset(root, split)
    choice = choose_backend(bundle, device=device)
    with closing(choice.backend):
        log.info(f"runs on: {choice.sentence}")
        return evaluate_bundle(bundle, choice.backend, dataset, ten_crop=ten_crop)


def data_of_run(bundle: Bundle) -> Path:
    """The data folder of the run that a bundle lies in; a bundle itself holds no paths."""
    config = bundle.folder.parent.parent / "config.json"
    try:
        root = msgspec.json.decode(config.read_bytes(), type=_RunConfig).data.root
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        root = None
    if root is None:
        raise UserError(f"{bundle.folder} does not lie in a run that names its data: use --data DIR")
    return Path(root)


class _RunData(msgspec.Struct):
    root: str | None = None


class _RunConfig(msgspec.Struct):
    """What is wanted of a run's `config.json`."""

    data: _RunData
