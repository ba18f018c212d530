"""The gate: ship an export only if it agrees with its checkpoint on real images."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray

from data_pipeline.common.errors import GateError, UserError
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.demo import read_photographs
from infer.bundle.describe import gate_lines
from infer.bundle.gate_report import LIMITS, GateReport
from infer.bundle.load import Bundle
from infer.bundle.schema import CPU_NAME, ENGINE_NAME, ONNX_NAME, FeatureLayer
from infer.export.compare import Runner, compare
from infer.runtime.base import InferenceBackend, Outputs
from infer.runtime.choose import probe_machine, why_no_engine
from infer.runtime.onnx import OnnxBackend
from infer.runtime.tensorrt import load_for_gate
from train.checkpoints.load import Checkpoint
from train.models.alexnet import Normalize

log = logging.getLogger("infer")

SIDES_PX = (128, 192, 256, 320)
WINDOWS = 8
"""Of each side and photograph."""


def run_gate(
    bundle: Bundle, checkpoint: Checkpoint, dataset: Dataset, earlier: GateReport | None = None
) -> GateReport:
    """Compare a draft bundle's files with the checkpoint, and raise if one does not agree.

    The ONNX file, and its form for a CPU if there is one, run in ONNX Runtime on the CPU, the checkpoint in
    torch in float32 on the CPU, the engine on the GPU where it can run. All see the same decoded validation
    images: see `infer.export.compare.compare`.

    Args:
        bundle: its files are written and measured; its manifest has no report yet.
        checkpoint: the source of the export.
        dataset: labelled images, as `train.evaluate.load_split` gives them; or such without classes.
        earlier: the report on the same ONNX files, which are then not run again; the engine is.
    Returns:
        The report to ship with it.
    Raises:
        GateError: a file beyond the limits; the whole report is logged first.
        UserError: not one validation image could be read.
    """
    manifest = bundle.manifest
    engine_not_run = why_no_engine(bundle, probe_machine()) if manifest.engine else None
    candidates: dict[str, InferenceBackend] = {}
    with ExitStack() as stack:
        if earlier is None:
            candidates[ONNX_NAME] = stack.enter_context(closing(OnnxBackend(bundle, "cpu", file=ONNX_NAME)))
            if manifest.cpu is not None:
                candidates[CPU_NAME] = stack.enter_context(closing(OnnxBackend(bundle, "cpu")))
        if manifest.engine and engine_not_run is None:
            candidates[ENGINE_NAME] = stack.enter_context(closing(load_for_gate(bundle)))
        elif earlier is not None:
            return replace(earlier, engine_not_run=engine_not_run)
        runners = {name: partial(candidate.run, features=True) for name, candidate in candidates.items()}
        found = compare(torch_runner(checkpoint, manifest.feature_layer), runners, dataset, manifest)
    if earlier is not None:
        report = replace(earlier, engine=found.agreements[ENGINE_NAME])
    else:
        report = GateReport(
            data=printable(dataset.root.resolve().name),
            split=dataset.split,
            num_images=found.num_images,
            num_available=found.num_available,
            num_failed=found.num_failed,
            checkpoint_accuracy=found.reference_accuracy,
            limits=LIMITS[manifest.precision],
            onnx=found.agreements[ONNX_NAME],
            onnx_provider=candidates[ONNX_NAME].provider,
            cpu=found.agreements.get(CPU_NAME),
            engine=found.agreements.get(ENGINE_NAME),
            engine_not_run=engine_not_run,
        )
    check_limits(report)
    return report


def check_limits(report: GateReport) -> None:
    """Log the agreement of each file, or raise if one is beyond the limits; then the whole report is logged.

    Raises:
        GateError: one line with all files and limits that are concerned.
    """
    beyond = {
        name: why
        for name, found in report.agreements.items()
        if (why := found.beyond(report.limits, report.checkpoint_accuracy))
    }
    if beyond:
        for line in gate_lines(report):
            log.info("%s", line)
        reasons = "; ".join(
            f"{name} does not agree with its checkpoint ({'; '.join(why)})" for name, why in beyond.items()
        )
        raise GateError(f"gate: {reasons}; nothing was shipped")
    for name, found in report.agreements.items():
        log.info(
            "gate: %s agrees with its checkpoint on %d images: top-1 %.2f%% (%d ties), top-5 %.2f%%, "
            "probabilities within %.2g, accuracy %s",
            *(name, report.num_images, found.top1_agreement * 100, found.num_ties),
            *(found.top5_agreement * 100, found.max_probability_difference),
            "unknown: these images have no labels"
            if found.accuracy is None
            else f"{found.accuracy:.4f} (checkpoint {report.checkpoint_accuracy:.4f})",
        )
        if found.max_feature_difference is not None:
            log.info("gate: its features are within %.2g of the largest", found.max_feature_difference)


def torch_runner(checkpoint: Checkpoint, features: FeatureLayer | None = None) -> Runner:
    """The checkpoint as a function from decoded images to probabilities and features: torch, float32, CPU."""
    network, normalize = checkpoint.make_model().float(), Normalize(checkpoint.preprocessing)

    @torch.inference_mode()
    def run(images_NHWC: NDArray[np.uint8]) -> Outputs:
        inputs_NCHW = normalize(torch.from_numpy(images_NHWC))
        if features is None:
            return Outputs(torch.softmax(network(inputs_NCHW), dim=1).numpy(), None)
        logits_NC, features_ND = network.forward_features(inputs_NCHW, features)
        return Outputs(torch.softmax(logits_NC, dim=1).numpy(), features_ND.numpy())

    return run


@contextmanager
def photograph_windows() -> Iterator[Dataset]:
    """Give images where there is no data set: windows of the two photographs that scikit-learn ships.

    They are 64 PNG files in a temporary folder, a dataset without labels. The gate's report names the folder,
    which says what they are.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        photographs = read_photographs()
    except UserError as error:
        raise UserError(f"{error}, or name ImageNet with --data") from error
    with tempfile.TemporaryDirectory() as temporary:
        root, paths = Path(temporary) / f"{' and '.join(photographs)} of scikit-learn", []
        (root / "windows").mkdir(parents=True)
        for name, photo in photographs.items():
            for side in SIDES_PX:
                for number in range(WINDOWS):
                    left = number * (photo.width - side) // (WINDOWS - 1)
                    top = number % 2 * (photo.height - side)
                    paths.append(f"{Path(name).stem}-{side}-{number}.png")
                    window = photo.crop((left, top, left + side, top + side))
                    window.save(root / "windows" / paths[-1], compress_level=1)
        yield Dataset(root, "windows", paths, np.zeros(len(paths), np.int64), classes=())
