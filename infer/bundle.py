"""The exported folder: the model's files, and `bundle.json` with what is needed to trust and run them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from data_pipeline.errors import CorruptFileError, UserError
from data_pipeline.files import sha256_of
from data_pipeline.preprocessing import Preprocessing

MANIFEST_NAME = "bundle.json"
MAX_MANIFEST_BYTES = 16 * 2**20
SCHEMA_VERSION = 2
ONNX_NAME = "model.onnx"
ENGINE_NAME = "model.engine"
INPUT_NAME = "images"
OUTPUT_NAME = "probabilities"

Format = Literal["onnx", "trt"]
Precision = Literal["fp32", "fp16", "int8"]
Count = Annotated[int, msgspec.Meta(ge=0)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
# One component, no leading dot: a name can neither leave the folder nor hide in it.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every part of the manifest is: immutable, and an unknown key is an error."""


class TensorSpec(_Strict, frozen=True):
    """An input or output of the model; a name in `shape` is a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class FileEntry(_Strict, frozen=True):
    """What a file of the bundle must be, byte for byte."""

    sha256: Sha256
    size_bytes: Count


class Origin(_Strict, frozen=True):
    """The checkpoint that was exported; `weights`: those of its last step, or their average over training."""

    sha256: Sha256
    step: Count
    epoch: Count
    recipe: str
    model: str
    weights: Literal["last", "average"] = "last"
    metrics: dict[str, float] = {}


class Engine(_Strict, frozen=True):
    """A TensorRT plan: who built it, and on which GPUs it loads (`sm89`, ...)."""

    library: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    gpus: tuple[Annotated[str, msgspec.Meta(pattern="^sm[0-9]+[a-z]?$")], ...]
    profile_batches: tuple[int, int, int]


class Limits(_Strict, frozen=True):
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


class Calibration(_Strict, frozen=True):
    """The training images that the ranges of an int8 model come from."""

    data: str
    split: str
    num_images: Count
    method: Literal["minmax"]


class Proof(_Strict, frozen=True):
    """The precision of an ONNX file, as read from the file.

    Args:
        computed_in: for each kind of operator, how many take which type.
        num_values: stored weights by type.
        num_quantize, num_dequantize: Q and DQ nodes.
    """

    computed_in: dict[str, dict[str, int]]
    num_values: dict[str, int]
    num_quantize: Count
    num_dequantize: Count


class Agreement(_Strict, frozen=True):
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


class GateReport(_Strict, frozen=True):
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


class Manifest(_Strict, frozen=True):
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
        if (self.engine is not None) != (self.format == "trt"):
            raise ValueError(f"format {self.format} and the engine's description contradict each other")
        if (self.calibration is not None) != (self.precision == "int8"):
            raise ValueError(f"precision {self.precision} and the calibration contradict each other")
        crop_px = self.preprocessing.crop_px
        if self.inputs != (image_input(crop_px),) or self.outputs != (probability_output(len(self.classes)),):
            raise ValueError("inputs or outputs do not fit the preprocessing and the classes")
        if not self.classes:
            raise ValueError("there are no classes")
        if len(self.labels_text) not in (0, len(self.classes)):
            raise ValueError(f"{len(self.labels_text)} labels for {len(self.classes)} classes")
        if not all(math.isfinite(v) for v in self.checkpoint.metrics.values()):
            raise ValueError("a metric is not a finite number")


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: where it lies, and what its manifest says."""

    folder: Path
    manifest: Manifest

    @property
    def onnx_path(self) -> Path:
        """The ONNX file; every bundle has one."""
        return self.folder / ONNX_NAME

    @property
    def engine_path(self) -> Path | None:
        """The TensorRT plan, or None in a bundle of format `onnx`."""
        return self.folder / ENGINE_NAME if self.manifest.engine else None


def image_input(crop_px: int) -> TensorSpec:
    """The one input that every bundle has: uint8 RGB, NHWC."""
    return TensorSpec(name=INPUT_NAME, dtype="uint8", shape=("batch", crop_px, crop_px, 3))


def probability_output(num_classes: int) -> TensorSpec:
    """The one output that every bundle has: softmax over the classes."""
    return TensorSpec(name=OUTPUT_NAME, dtype="float32", shape=("batch", num_classes))


def load_bundle(path: Path) -> Bundle:
    """Read a bundle and verify every file of it before anything uses one.

    Args:
        path: the bundle's folder, or its `bundle.json`.
    Raises:
        UserError: there is no bundle here, or a newer version of this program wrote it.
        CorruptFileError: the manifest is damaged, or a file is missing, a link, or not what was written.
    """
    folder = path.parent if path.name == MANIFEST_NAME else path
    manifest = _read_manifest(folder)
    if manifest.report is None:
        raise CorruptFileError(f"{folder / MANIFEST_NAME} has no gate report; export the checkpoint again")
    for name, entry in manifest.files.items():
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise CorruptFileError(f"{file}: missing, or not a plain file; export the checkpoint again")
        if file.stat().st_size != entry.size_bytes or sha256_of(file) != entry.sha256:
            raise CorruptFileError(
                f"{file}: not what was exported (another size or SHA-256); export the checkpoint again"
            )
    return Bundle(folder, manifest)


def find_bundle(path: Path | None, *, runs: Path = Path("runs")) -> Path:
    """The folder of a bundle: the one asked for, or the newest export.

    Args:
        path: a bundle's folder or its `bundle.json`; a run's folder stands for its newest export; None for
            the newest export of all runs.
        runs: where runs are looked for when `path` is None.
    Raises:
        UserError: there is none.
    """
    if path is None:
        found = _newest(runs.glob(f"*/export/*/{MANIFEST_NAME}"))
        if found is None:
            raise UserError(f"no exported model under {runs}/: run `alexnet export` first, or name a bundle")
        return found
    if path.name == MANIFEST_NAME and path.is_file():
        return path.parent
    if (path / MANIFEST_NAME).is_file():
        return path
    found = _newest(path.glob(f"export/*/{MANIFEST_NAME}")) if path.is_dir() else None
    if found is None:
        what = f"holds no {MANIFEST_NAME}" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}: name a folder that `alexnet export` wrote")
    return found


def _newest(manifests: Iterable[Path]) -> Path | None:
    """The folder of the newest of these manifests, by what they say of themselves."""
    folders = [m.parent for m in manifests if not m.parent.name.startswith(".")]
    return max(folders, key=lambda f: (_created(f), f.name), default=None)


def _created(folder: Path) -> float:
    """When a bundle was exported, in seconds since 1970; by its file's time if the manifest cannot tell.

    So a damaged newest export is still the one that is chosen, and loading it says what is wrong.
    """
    try:
        return datetime.fromisoformat(_read_manifest(folder).created).timestamp()
    except (UserError, CorruptFileError, ValueError):
        return (folder / MANIFEST_NAME).stat().st_mtime


def now_utc() -> str:
    """The time of an export, as the manifest writes it."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


class _Version(msgspec.Struct):
    schema_version: int


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise UserError(f"{folder} holds no {MANIFEST_NAME}: name a folder that `alexnet export` wrote")
    with path.open("rb") as file:
        text = file.read(MAX_MANIFEST_BYTES + 1)
    if len(text) > MAX_MANIFEST_BYTES:
        raise CorruptFileError(f"{path}: larger than {MAX_MANIFEST_BYTES >> 20} MiB; not a manifest of ours")
    try:
        version = msgspec.json.decode(text, type=_Version).schema_version
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{path} has schema {version}, and this program reads up to {SCHEMA_VERSION}: upgrade alexnet"
            )
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{path}: {error}; export the checkpoint again") from error
