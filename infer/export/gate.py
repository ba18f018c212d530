"""The gate: an export is shipped only if it agrees with its checkpoint on real validation images."""

from __future__ import annotations

import logging

import numpy as np
import torch
from msgspec.structs import replace
from numpy.typing import NDArray

from data_pipeline.common.errors import GateError
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from infer.bundle.describe import gate_lines
from infer.bundle.load import Bundle
from infer.bundle.manifest import CPU_NAME, ENGINE_NAME, LIMITS, ONNX_NAME, GateReport, beyond_limits
from infer.export.compare import Probabilities, Runner, compare
from infer.runtime.base import InferenceBackend
from infer.runtime.choose import probe_machine, why_no_engine
from infer.runtime.onnx import OnnxBackend
from infer.runtime.tensorrt import load_for_gate
from train.checkpoints.load import Checkpoint
from train.models.alexnet import Normalize

log = logging.getLogger("infer")


def run_gate(
    bundle: Bundle, checkpoint: Checkpoint, dataset: Dataset, proven: GateReport | None = None
) -> GateReport:
    """Compare a draft bundle's files with the checkpoint, and say yes or raise.

    The ONNX file, and the form of it for a CPU if there is one, run in ONNX Runtime on the CPU, the
    checkpoint in torch in float32 on the CPU, the engine on the GPU where it can run. All see the same
    decoded validation images: see `infer.export.compare.compare`.

    Args:
        bundle: its files are written and measured; its report is not there yet.
        checkpoint: what it was made from.
        dataset: labelled images, as `train.evaluate.load_split` gives them.
        proven: the report on the same ONNX file, which then is not run again; its engine is.
    Returns:
        The report to ship with it.
    Raises:
        GateError: an artefact beyond the limits; the whole report is logged first.
        UserError: not one validation image could be read.
    """
    manifest = bundle.manifest
    limits = LIMITS[manifest.precision]
    engine_not_run = why_no_engine(bundle, probe_machine()) if manifest.engine else None
    candidates: dict[str, InferenceBackend] = {}
    try:
        if proven is None:
            candidates[ONNX_NAME] = OnnxBackend(bundle, "cpu", file=ONNX_NAME)
            if manifest.cpu is not None:
                candidates[CPU_NAME] = OnnxBackend(bundle, "cpu")
        if manifest.engine and engine_not_run is None:
            candidates[ENGINE_NAME] = load_for_gate(bundle)
        if proven is not None and not candidates:
            return replace(proven, engine_not_run=engine_not_run)
        found = compare(
            torch_runner(checkpoint),
            {name: candidate.run for name, candidate in candidates.items()},
            dataset,
            checkpoint.preprocessing,
            limits,
            manifest.max_batch,
        )
        onnx = candidates.get(ONNX_NAME)
        provider = onnx.provider if onnx is not None else ""
    finally:
        for candidate in candidates.values():
            candidate.close()
    engine = found.agreements.get(ENGINE_NAME)
    if proven is not None:
        report = replace(proven, engine=engine, engine_not_run=None)
    else:
        report = GateReport(
            data=printable(dataset.root.resolve().name),
            split=dataset.split,
            num_images=found.num_images,
            num_available=found.num_available,
            num_failed=found.num_failed,
            checkpoint_accuracy=found.reference_accuracy,
            limits=limits,
            onnx=found.agreements[ONNX_NAME],
            onnx_provider=provider,
            cpu=found.agreements.get(CPU_NAME),
            engine=engine,
            engine_not_run=engine_not_run,
        )
    judge(report)
    return report


def judge(report: GateReport) -> None:
    """Raise for artefacts beyond the limits, all of them in one line, behind the whole report on stderr.

    Raises:
        GateError: with what is beyond which limit.
    """
    named = {ONNX_NAME: report.onnx, CPU_NAME: report.cpu, ENGINE_NAME: report.engine}
    judged = {name: agreement for name, agreement in named.items() if agreement is not None}
    beyond = {
        name: why
        for name, agreement in judged.items()
        if (why := beyond_limits(agreement, report.limits, report.checkpoint_accuracy))
    }
    if not beyond:
        for name, found in judged.items():
            log.info(
                "gate: %s agrees with its checkpoint on %d images: top-1 %.2f%% (%d ties), top-5 %.2f%%, "
                "probabilities within %.2g, accuracy %.4f (checkpoint %.4f)",
                *(name, report.num_images, found.top1_agreement * 100, found.num_ties),
                *(found.top5_agreement * 100, found.max_probability_difference),
                *(found.accuracy, report.checkpoint_accuracy),
            )
        return
    for line in gate_lines(report):
        log.info("%s", line)
    reasons = "; ".join(
        f"{name} does not agree with its checkpoint ({'; '.join(why)})" for name, why in beyond.items()
    )
    raise GateError(f"gate: {reasons}; nothing was shipped")


def torch_runner(checkpoint: Checkpoint) -> Runner:
    """The checkpoint as a function from decoded images to probabilities: torch, float32, CPU."""
    network, normalize = checkpoint.make_model().float(), Normalize(checkpoint.preprocessing)

    @torch.inference_mode()
    def run(images_NHWC: NDArray[np.uint8]) -> Probabilities:
        logits_NC = network(normalize(torch.from_numpy(images_NHWC)))
        probabilities_NC: Probabilities = torch.softmax(logits_NC, dim=1).numpy()
        return probabilities_NC

    return run
