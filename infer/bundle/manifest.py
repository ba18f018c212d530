"""What an export says for itself: the engine, the proof of its precision, and the gate's verdict."""

from __future__ import annotations

import hashlib
import math
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.transforms.preprocessing import Preprocessing

Precision = Literal["fp32", "fp16", "int8"]
Count = Annotated[int, msgspec.Meta(ge=0)]


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every part of the manifest is: immutable, and an unknown key is an error."""


class Engine(Strict, frozen=True):
    """A TensorRT plan: who built it, and on which GPUs it loads (`sm89`, ...).

    Args:
        profile_batches: smallest, tuned and largest batch of its one optimisation profile.
        builder_level: the builder's optimisation level; None in bundles that are older than the option.
        built_on: the GPU that it was timed on; empty for one that was built ahead of time.
    """

    library: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    gpus: tuple[Annotated[str, msgspec.Meta(pattern="^sm[0-9]+[a-z]?$")], ...]
    profile_batches: tuple[int, int, int]
    builder_level: int | None = None
    built_on: str = ""


class Limits(Strict, frozen=True):
    """What the gate demands; agreement and accuracy in 0..1, differences in probability; None is no limit.

    Args:
        tie_margin: classes that the checkpoint holds to be equal within this are one and the same.
        top5_margin: the same at the edge of the five best; None for `tie_margin`.
        max_accuracy_loss: how far the accuracy may lie below the checkpoint's.
    """

    min_top1_agreement: float
    min_top5_agreement: float
    max_probability_difference: float | None
    tie_margin: float
    top5_margin: float | None = None
    max_accuracy_loss: float | None = None


class Calibration(Strict, frozen=True):
    """The training images that the ranges of an int8 model come from."""

    data: str
    split: str
    num_images: Count
    method: Literal["minmax"]


class Proof(Strict, frozen=True):
    """The precision of an ONNX file, as read from the file.

    Args:
        computed_in: for each kind of operator, how many take which type.
        num_values: stored weights by type.
        num_quantize, num_dequantize: Q and DQ nodes.
        opset, ir_version: which ONNX a runtime must know; None in bundles that are older than the fields.
    """

    computed_in: dict[str, dict[str, int]]
    num_values: dict[str, int]
    num_quantize: Count
    num_dequantize: Count
    opset: int | None = None
    ir_version: int | None = None


class CpuModel(Strict, frozen=True):
    """The form of the model that ONNX Runtime's CPU provider runs, where it is not `model.onnx` itself.

    Args:
        file: its name in the bundle.
        reads: the file that holds the weights which it has not itself; empty where it has all.
        proof: its precision, as read from the file; the sums of LRN, in float32 always, are not counted.
    """

    file: str
    reads: str
    proof: Proof


class Agreement(Strict, frozen=True):
    """One artefact against the checkpoint, over `num_images` images of the gate.

    Args:
        top1_agreement: share of images with the same best class, ties included.
        top5_agreement: share of images with the same five best classes, ties included.
        num_ties: images whose best class differs, between classes that the checkpoint holds to be equal
            within `Limits.tie_margin`.
        max_probability_difference: largest difference of any class on any image.
        mean_probability_difference: mean over all classes and images.
        accuracy: top-1 accuracy of the artefact on these images.
    """

    top1_agreement: float
    top5_agreement: float
    num_ties: Count
    max_probability_difference: float
    mean_probability_difference: float
    accuracy: float


class GateReport(Strict, frozen=True):
    """The verdict that the export was shipped on."""

    data: str
    split: str
    num_images: Count
    num_available: Count
    num_failed: Count
    checkpoint_accuracy: float
    limits: Limits
    onnx: Agreement
    onnx_provider: str
    engine: Agreement | None = None
    engine_not_run: str | None = None
    cpu: Agreement | None = None


class Rebuild(Strict, frozen=True):
    """An engine that was built from `model.onnx` after the export, where there was no checkpoint.

    The gate's report holds for `model.onnx`, whose bytes are the same; for the engine it is replaced by this.

    Args:
        created: when, in UTC.
        replaces: the engine that was there; None where there was none.
        data, split: the images that the new engine was held against `model.onnx` on; empty for none.
        num_images, num_failed: how many of them there were, and could not be read.
        onnx_accuracy: top-1 accuracy of `model.onnx` on them.
        agreement: the engine against `model.onnx`; None where they were not compared.
        unknown: why they were not; None where they were.
    """

    created: str
    replaces: Engine | None
    data: str = ""
    split: str = ""
    num_images: Count = 0
    num_failed: Count = 0
    onnx_accuracy: float | None = None
    agreement: Agreement | None = None
    unknown: str | None = None

    def __post_init__(self) -> None:
        if (self.agreement is None) != (self.unknown is not None) or (self.agreement is None) != (
            self.onnx_accuracy is None
        ):
            raise ValueError("an engine that was built again was either compared or it was not")


def beyond_limits(found: Agreement, limits: Limits, reference_accuracy: float) -> list[str]:
    """In what an artefact is beyond its limits, one phrase each; empty if it passes."""
    least = (
        ("top-1 agreement", found.top1_agreement, limits.min_top1_agreement),
        ("top-5 agreement", found.top5_agreement, limits.min_top5_agreement),
    )
    beyond = [f"{what} {value:.2%}, below {limit:.2%}" for what, value, limit in least if value < limit]
    most = limits.max_probability_difference
    if most is not None and found.max_probability_difference > most:
        beyond.append(f"a probability differs by {found.max_probability_difference:.2g}, more than {most:g}")
    loss = reference_accuracy - found.accuracy
    # A hair more than the limit, so that exactly half a point is within it in floating point, too.
    if limits.max_accuracy_loss is not None and loss > limits.max_accuracy_loss + 1e-9:
        beyond.append(
            f"accuracy {found.accuracy:.2%}, {loss * 100:.2f} points below the reference's; at most "
            f"{limits.max_accuracy_loss * 100:g}"
        )
    return beyond


MANIFEST_NAME = "bundle.json"
SEAL = "manifest_sha256"
MAX_MANIFEST_BYTES = 16 * 2**20
SCHEMA_VERSION = 4
_OLDEST_SCHEMA = 2
_SEALED_SINCE = 3
ONNX_NAME = "model.onnx"
CPU_NAME = "model.cpu.onnx"
ENGINE_NAME = "model.engine"
INPUT_NAME = "images"
OUTPUT_NAME = "probabilities"


Format = Literal["onnx", "trt"]


Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


# One component, no leading dot: a name can neither leave the folder nor hide in it.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class TensorSpec(Strict, frozen=True):
    """An input or output of the model; a name in `shape` is a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class FileEntry(Strict, frozen=True):
    """What a file of the bundle must be, byte for byte."""

    sha256: Sha256
    size_bytes: Count


class Origin(Strict, frozen=True):
    """The checkpoint that was exported; `weights`: those of its last step, or their average over training."""

    sha256: Sha256
    step: Count
    epoch: Count
    recipe: str
    model: str
    weights: Literal["last", "average"] = "last"
    metrics: dict[str, float] = msgspec.field(default_factory=dict)


class Manifest(Strict, frozen=True):
    """`bundle.json`. `report` is None only while an export is being made: nothing ungated is shipped.

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
    proof: Proof | None = None
    report: GateReport | None = None
    labels_text: tuple[str, ...] = ()
    rebuild: Rebuild | None = None
    cpu: CpuModel | None = None

    @property
    def class_labels(self) -> tuple[str, ...]:
        """The names of the classes for people, by class id: `labels_text`, else the classes themselves."""
        return self.labels_text or self.classes

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
        if self.report is not None:
            self._check_report(self.report)
        crop_px = self.preprocessing.crop_px
        if self.inputs != (image_input(crop_px),) or self.outputs != (probability_output(len(self.classes)),):
            raise ValueError("inputs or outputs do not fit the preprocessing and the classes")
        if not self.classes:
            raise ValueError("there are no classes")
        if len(self.labels_text) not in (0, len(self.classes)):
            raise ValueError(f"{len(self.labels_text)} labels for {len(self.classes)} classes")
        if not all(math.isfinite(v) for v in self.checkpoint.metrics.values()):
            raise ValueError("a metric is not a finite number")

    def _check_report(self, gate: GateReport) -> None:
        """Hold the gate's report against its own limits: what is beyond them was never shipped."""
        if (self.engine is None) != (gate.engine is None and gate.engine_not_run is None):
            raise ValueError("the gate's report and the engine's description contradict each other")
        if (self.cpu is None) != (gate.cpu is None):
            raise ValueError(f"the gate's report and the description of {CPU_NAME} contradict each other")
        judged = [
            (found, gate.checkpoint_accuracy)
            for found in (gate.onnx, gate.cpu, gate.engine)
            if found is not None
        ]
        if self.rebuild is not None and self.rebuild.agreement is not None:
            assert self.rebuild.onnx_accuracy is not None
            judged.append((self.rebuild.agreement, self.rebuild.onnx_accuracy))
        for found, accuracy in judged:
            if beyond := beyond_limits(found, gate.limits, accuracy):
                raise ValueError(f"the gate's report is beyond its own limits: {beyond[0]}")


def image_input(crop_px: int) -> TensorSpec:
    """The one input that every bundle has: uint8 RGB, NHWC."""
    return TensorSpec(name=INPUT_NAME, dtype="uint8", shape=("batch", crop_px, crop_px, 3))


def probability_output(num_classes: int) -> TensorSpec:
    """The one output that every bundle has: softmax over the classes."""
    return TensorSpec(name=OUTPUT_NAME, dtype="float32", shape=("batch", num_classes))


def encode_manifest(manifest: Manifest) -> bytes:
    """`bundle.json` as it is written: the manifest, and the seal over all of it."""
    plain = msgspec.json.decode(msgspec.json.encode(manifest))
    return msgspec.json.format(msgspec.json.encode({**plain, SEAL: seal_text(plain)}), indent=2) + b"\n"


def seal_of(folder: Path) -> str | None:
    """The SHA-256 that a bundle's manifest carries over itself: with it, the whole bundle has one name.

    Returns:
        None for a bundle of an older schema, which has none.
    """
    seal = msgspec.json.decode((folder / MANIFEST_NAME).read_bytes()).get(SEAL)
    return None if seal is None else str(seal)


def seal_text(plain: dict[str, Any]) -> str:
    """The seal of a manifest's other keys, whatever their order and spacing in the file."""
    return hashlib.sha256(msgspec.json.encode(plain, order="sorted")).hexdigest()


def now_utc() -> str:
    """The time of an export, as the manifest writes it."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def read_manifest(folder: Path) -> Manifest:
    """What a folder says of itself. Nothing of it is verified but the manifest: see `load_bundle`.

    Raises:
        UserError: there is no bundle here, or a version of this program wrote it that is newer or too old.
        CorruptFileError: the manifest is damaged, was changed, or contradicts itself.
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
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema {version}, and this program reads up to {SCHEMA_VERSION}: upgrade alexnet"
            )
        if version < _OLDEST_SCHEMA:
            raise UserError(
                f"{path} has schema {version}, and this program reads {_OLDEST_SCHEMA} to {SCHEMA_VERSION}: "
                "export the checkpoint again"
            )
        seal = plain.pop(SEAL, None)
        if (version >= _SEALED_SINCE or seal is not None) and seal != seal_text(plain):
            raise CorruptFileError(
                f"{path}: not what was exported (it does not match its {SEAL}); export the checkpoint again"
            )
        return msgspec.convert(plain, Manifest)
    except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptFileError(f"{path}: {error}; export the checkpoint again") from error


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
