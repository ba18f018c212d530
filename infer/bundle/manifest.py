"""`bundle.json`: the manifest of an export, its consistency checks, and its text on the disk."""

from __future__ import annotations

import math
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import msgspec

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.results.sealed import SEAL, take_seal
from data_pipeline.transforms.preprocessing import Preprocessing
from infer.bundle.gate_report import GateReport, Rebuild
from infer.bundle.schema import (
    CPU_NAME,
    ENGINE_NAME,
    MANIFEST_NAME,
    ONNX_NAME,
    Calibration,
    CpuModel,
    Engine,
    FeatureLayer,
    FileEntry,
    Format,
    Origin,
    Precision,
    PrecisionCheck,
    Strict,
    TensorSpec,
    image_input,
    is_feature_output,
    probability_output,
)

SCHEMA_VERSION = 1
MAX_MANIFEST_BYTES = 16 * 2**20
# One component, no leading dot: a name can neither leave the folder nor hide in it.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Manifest(Strict, frozen=True, kw_only=True):
    """The content of `bundle.json`.

    Attributes:
        precision_check: of `model.onnx`.
        report: None only while an export is being made: nothing is shipped without it.
        labels_text: names of the classes for people; empty where the data had none.
        rebuild: of an engine that was built after the export.
        cpu: None where `model.onnx` itself runs on a CPU.
    Raises:
        ValueError: parts that contradict each other.
    """

    schema_version: int
    created: str
    format: Format
    precision: Precision
    max_batch: Annotated[int, msgspec.Meta(ge=1)]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    files: dict[str, FileEntry]
    checkpoint: Origin
    versions: dict[str, str]
    engine: Engine | None = None
    calibration: Calibration | None = None
    precision_check: PrecisionCheck = msgspec.field(name="proof")
    report: GateReport | None = None
    labels_text: tuple[str, ...] = ()
    rebuild: Rebuild | None = None
    cpu: CpuModel | None = None

    @property
    def class_labels(self) -> tuple[str, ...]:
        """The names of the classes for people, by class id: `labels_text`, else the classes themselves."""
        return self.labels_text or self.classes

    @property
    def feature_layer(self) -> FeatureLayer | None:
        """The layer whose features are the second output; None where there is none."""
        return msgspec.convert(self.outputs[1].name, FeatureLayer) if len(self.outputs) > 1 else None

    @property
    def num_features(self) -> int:
        """Number of features of an image; 0 without a second output."""
        return int(self.outputs[1].shape[-1]) if len(self.outputs) > 1 else 0

    def __post_init__(self) -> None:
        for name in self.files:
            if not _FILE_NAME.fullmatch(name) or name == MANIFEST_NAME:
                raise ValueError(f"the file name {name!r} leaves the bundle's folder or is not allowed in it")
        wanted = {ONNX_NAME, ENGINE_NAME} if self.format == "trt" else {ONNX_NAME}
        if missing := sorted(wanted - self.files.keys()):
            raise ValueError(f"a bundle of format {self.format} lists {', '.join(missing)}")
        if (self.cpu is None) != (CPU_NAME not in self.files) or (self.cpu and self.cpu.file != CPU_NAME):
            raise ValueError(f"the files and the description of {CPU_NAME} contradict each other")
        if (self.engine is not None) != (self.format == "trt"):
            raise ValueError(f"format {self.format} and the engine's description contradict each other")
        if (self.calibration is not None) != (self.precision == "int8"):
            raise ValueError(f"precision {self.precision} and the calibration contradict each other")
        if self.engine is None and self.rebuild is not None:
            raise ValueError("an engine was built again, and there is none")
        images, probabilities = image_input(self.preprocessing.crop_px), probability_output(len(self.classes))
        if self.inputs != (images,) or self.outputs[:1] != (probabilities,):
            raise ValueError("inputs or outputs do not fit the preprocessing and the classes")
        features = self.outputs[1:]
        if len(features) > 1 or not all(map(is_feature_output, features)):
            raise ValueError("there are outputs besides the probabilities that are no layer's features")
        if not self.classes:
            raise ValueError("there are no classes")
        if len(self.labels_text) not in (0, len(self.classes)):
            raise ValueError(f"{len(self.labels_text)} labels for {len(self.classes)} classes")
        if not all(math.isfinite(v) for v in self.checkpoint.metrics.values()):
            raise ValueError("a metric is not a finite number")
        if self.report is not None:
            self._check_report(self.report)

    def _check_report(self, gate: GateReport) -> None:
        """Compare the gate's report with its own limits: what is beyond them was never shipped."""
        if (self.engine is None) != (gate.engine is None and gate.engine_not_run is None):
            raise ValueError("the gate's report and the engine's description contradict each other")
        if (self.cpu is None) != (gate.cpu is None):
            raise ValueError(f"the gate's report and the description of {CPU_NAME} contradict each other")
        without = [found for found in gate.agreements.values() if found.max_feature_difference is None]
        if without if self.feature_layer is not None else len(without) < len(gate.agreements):
            raise ValueError("the gate's report and the outputs contradict each other")
        compared = [(found, gate.checkpoint_accuracy) for found in gate.agreements.values()]
        if self.rebuild is not None and self.rebuild.agreement is not None:
            assert self.rebuild.onnx_accuracy is not None
            compared.append((self.rebuild.agreement, self.rebuild.onnx_accuracy))
        for found, accuracy in compared:
            if beyond := found.beyond(gate.limits, accuracy):
                raise ValueError(f"the gate's report is beyond its own limits: {beyond[0]}")


def now_utc() -> str:
    """The time of an export, in the manifest's format."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def read_digest(folder: Path) -> str:
    """The digest that a bundle's manifest carries; `read_manifest` compares it with the content."""
    return str(msgspec.json.decode((folder / MANIFEST_NAME).read_bytes())[SEAL])


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's `bundle.json`. Only the manifest itself is verified: see `load_bundle` for the files.

    Raises:
        UserError: there is no bundle here, or one of another schema.
        CorruptFileError: the manifest is damaged, was changed, contradicts itself, or has no gate report.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"{folder} holds no {MANIFEST_NAME}: name a folder that `alexnet export` wrote")
    with path.open("rb") as file:
        text = file.read(MAX_MANIFEST_BYTES + 1)
    if len(text) > MAX_MANIFEST_BYTES:
        raise CorruptFileError(f"{path}: larger than {MAX_MANIFEST_BYTES >> 20} MiB; not a manifest of ours")
    try:
        plain = msgspec.json.decode(text, type=dict[str, Any])
        version = msgspec.convert(plain.get("schema_version"), int)
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema {version}, and this program reads {SCHEMA_VERSION}: "
                "export the checkpoint again"
            )
        if not take_seal(plain):
            raise CorruptFileError(
                f"{path}: not what was exported (it does not match its {SEAL}); export the checkpoint again"
            )
        manifest = msgspec.convert(plain, Manifest)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptFileError(f"{path}: {error}; export the checkpoint again") from error
    if manifest.report is None:
        raise CorruptFileError(f"{path} has no gate report; export the checkpoint again")
    return manifest


def metadata_mismatch(metadata: dict[str, str], manifest: Manifest) -> str | None:
    """Describe how an ONNX file's metadata disagree with the manifest, or None.

    A mismatch means that the file is from another export.

    Args:
        metadata: `custom_metadata_map` of ONNX Runtime; `metadata_props` in the file.
        manifest: of the bundle that the file lies in.
    """
    if metadata.get("checkpoint_sha256") != manifest.checkpoint.sha256:
        return "another checkpoint"
    for key, expected, difference in (
        ("classes", manifest.classes, "other labels"),
        ("labels", manifest.class_labels, "other names of its classes"),
        ("preprocessing", manifest.preprocessing, "another preprocessing"),
    ):
        try:
            found = msgspec.json.decode(metadata.get(key, ""), type=type(expected))
        except msgspec.MsgspecError:
            return difference
        if found != expected:
            return difference
    return None
