"""The gate: an export is shipped only if it agrees with its checkpoint on real validation images."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.console import show_progress
from data_pipeline.errors import GateError, UserError
from data_pipeline.faults import printable
from data_pipeline.index import Dataset
from data_pipeline.loader import eval_batches
from infer.backends import InferenceBackend, OnnxBackend, probe_machine, why_no_engine
from infer.bundle import Agreement, Bundle, GateReport, Limits, Precision
from infer.images import open_decoder, valid_images
from infer.tensorrt_backend import TensorRTBackend
from train.checkpoint import Checkpoint
from train.model import Normalize

log = logging.getLogger("infer")

# Shapes: N images, C classes, K the five best.

LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(
        min_top1_agreement=1.0, min_top5_agreement=1.0, max_probability_difference=1e-4, tie_margin=2e-4
    ),
    # float16 keeps 11 bits: a probability near one half moves by thousandths.
    "fp16": Limits(
        min_top1_agreement=0.999, min_top5_agreement=0.999, max_probability_difference=1e-2, tie_margin=2e-3
    ),
    # The best class is compared without ties; the order of the improbable ones is not int8's promise.
    "int8": Limits(
        min_top1_agreement=0.99,
        min_top5_agreement=0.99,
        max_probability_difference=None,
        tie_margin=0.0,
        top5_margin=0.05,
        max_accuracy_loss=0.005,
    ),
}
MAX_IMAGES = 1000
MAX_GATE_BATCH = 32
TOP_K = 5

Probabilities = NDArray[np.float32]
Runner = Callable[[NDArray[np.uint8]], Probabilities]


def run_gate(bundle: Bundle, checkpoint: Checkpoint, dataset: Dataset) -> GateReport:
    """Compare a draft bundle's files with the checkpoint, and say yes or raise.

    The ONNX file runs in ONNX Runtime on the CPU, the checkpoint in torch in float32 on the CPU, the engine
    on the GPU where it can run. All see the same decoded validation images: all of them, or 1,000 spread
    evenly over the split.

    Where the candidate's best class differs from the checkpoint's, but the checkpoint holds both to be equal
    within `Limits.tie_margin` (twice the difference that a probability may have), that is a tie: it counts
    as agreement, and is counted in `num_ties`. The same goes for the edge of the five best.

    Args:
        bundle: its files are written and measured; its report is not there yet.
        checkpoint: what it was made from.
        dataset: labelled images, as `train.evaluate.load_split` gives them.
    Returns:
        The report to ship with it.
    Raises:
        GateError: an artefact beyond the limits.
        UserError: not one validation image could be read.
    """
    manifest = bundle.manifest
    limits = LIMITS[manifest.precision]
    sample = spread(dataset, MAX_IMAGES)
    candidates: dict[str, InferenceBackend] = {"onnx": OnnxBackend(bundle, "cpu")}
    engine_not_run = why_no_engine(bundle, probe_machine()) if manifest.engine else None
    try:
        provider = candidates["onnx"].provider
        if manifest.engine and engine_not_run is None:
            candidates["engine"] = _load_engine(bundle)
        tallies = {name: Tally(limits) for name in candidates}
        reference = torch_runner(checkpoint)
        counts = np.zeros(2, np.int64)  # images, correct ones of the checkpoint
        num_failed = 0
        size = min(manifest.max_batch, MAX_GATE_BATCH)
        with (
            open_decoder(checkpoint.preprocessing, size) as decoder,
            show_progress("gate", len(sample)) as progress,
        ):
            for batch in eval_batches(sample, decoder, checkpoint.preprocessing, micro_batch=size):
                images_NHWC, labels_N = valid_images(batch), batch.labels[batch.valid]
                num_failed += len(batch.failures)
                progress.advance(len(batch))
                if not len(labels_N):
                    continue
                expected_NC = reference(images_NHWC)
                counts += len(labels_N), (expected_NC.argmax(1) == labels_N).sum()
                for name, candidate in candidates.items():
                    tallies[name].add(expected_NC, candidate.run(images_NHWC), labels_N)
    finally:
        for candidate in candidates.values():
            candidate.close()
    if not counts[0]:
        raise UserError(
            f"none of the {num_failed} validation images in {printable(dataset.root)} could be read"
        )
    report = GateReport(
        data=printable(dataset.root.resolve().name),
        split=dataset.split,
        num_images=int(counts[0]),
        num_available=len(dataset),
        num_failed=num_failed,
        checkpoint_accuracy=float(counts[1] / counts[0]),
        limits=limits,
        onnx=tallies["onnx"].agreement(),
        onnx_provider=provider,
        engine=tallies["engine"].agreement() if "engine" in tallies else None,
        engine_not_run=engine_not_run,
    )
    _judge("model.onnx", report.onnx, report)
    if report.engine:
        _judge("model.engine", report.engine, report)
    elif engine_not_run:
        log.info("gate: model.engine was built but not run here, since %s", engine_not_run)
    return report


def spread(dataset: Dataset, limit: int) -> Dataset:
    """The dataset, or `limit` of its samples spread evenly, so that every class has its share."""
    if len(dataset) <= limit:
        return dataset
    chosen = np.arange(limit, dtype=np.int64) * len(dataset) // limit
    return dataset.take(chosen)


def torch_runner(checkpoint: Checkpoint) -> Runner:
    """The checkpoint as a function from decoded images to probabilities: torch, float32, CPU."""
    network, normalize = checkpoint.make_model().float(), Normalize(checkpoint.preprocessing)

    @torch.inference_mode()
    def run(images_NHWC: NDArray[np.uint8]) -> Probabilities:
        logits_NC = network(normalize(torch.from_numpy(images_NHWC)))
        probabilities_NC: Probabilities = torch.softmax(logits_NC, dim=1).numpy()
        return probabilities_NC

    return run


class Tally:
    """Running comparison of one artefact with the checkpoint."""

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


def _judge(name: str, found: Agreement, report: GateReport) -> None:
    limits = report.limits
    least = (
        ("top-1 agreement", found.top1_agreement, limits.min_top1_agreement),
        ("top-5 agreement", found.top5_agreement, limits.min_top5_agreement),
    )
    beyond = [f"{what} {value:.2%}, below {limit:.2%}" for what, value, limit in least if value < limit]
    most = limits.max_probability_difference
    if most is not None and found.max_probability_difference > most:
        beyond.append(f"a probability differs by {found.max_probability_difference:.2g}, more than {most:g}")
    loss = report.checkpoint_accuracy - found.accuracy
    if limits.max_accuracy_loss is not None and loss > limits.max_accuracy_loss:
        beyond.append(
            f"accuracy {found.accuracy:.2%}, {loss * 100:.2f} points below the checkpoint's; at most "
            f"{limits.max_accuracy_loss * 100:g}"
        )
    if beyond:
        why = "; ".join(beyond)
        raise GateError(f"gate: {name} does not agree with its checkpoint ({why}); nothing was shipped")
    log.info(
        "gate: %s agrees with its checkpoint on %d images: top-1 %.2f%% (%d ties), top-5 %.2f%%, "
        "probabilities within %.2g, accuracy %.4f (checkpoint %.4f)",
        *(name, report.num_images, found.top1_agreement * 100, found.num_ties, found.top5_agreement * 100),
        *(found.max_probability_difference, found.accuracy, report.checkpoint_accuracy),
    )


def _load_engine(bundle: Bundle) -> TensorRTBackend:
    try:
        return TensorRTBackend(bundle)
    except UserError as error:
        raise GateError(f"gate: the engine should run on this GPU and does not: {error}") from error
