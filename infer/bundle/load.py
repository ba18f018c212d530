"""The exported folder: the model's files, and `bundle.json` with what is needed to trust and run them."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import sha256_of
from data_pipeline.transforms.preprocessing import Preprocessing
from infer.bundle.manifest import Agreement as Agreement
from infer.bundle.manifest import Calibration as Calibration
from infer.bundle.manifest import Count, Rebuild, Strict, beyond_limits
from infer.bundle.manifest import CpuModel as CpuModel
from infer.bundle.manifest import Engine as Engine
from infer.bundle.manifest import GateReport as GateReport
from infer.bundle.manifest import Limits as Limits
from infer.bundle.manifest import Precision as Precision
from infer.bundle.manifest import Proof as Proof

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
    def cpu_path(self) -> Path:
        """What ONNX Runtime runs on a CPU: a form of the model for it, or the ONNX file."""
        return self.folder / (self.manifest.cpu.file if self.manifest.cpu else ONNX_NAME)

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


def load_bundle(path: Path, *, without: Collection[str] = ()) -> Bundle:
    """Read a bundle and verify every file of it before anything uses one.

    Args:
        path: the bundle's folder, or its `bundle.json`.
        without: files that the caller will replace and not use; they are not looked at.
    Raises:
        UserError: there is no bundle here, or a newer version of this program wrote it.
        CorruptFileError: the manifest is damaged, or a file is missing, a link, or not what was written.
    """
    folder = path.parent if path.name == MANIFEST_NAME else path
    manifest = read_manifest(folder)
    if manifest.report is None:
        raise CorruptFileError(f"{folder / MANIFEST_NAME} has no gate report; export the checkpoint again")
    for name, entry in manifest.files.items():
        if name not in without and (problem := file_problem(folder / name, entry)):
            raise CorruptFileError(f"{folder / name}: {problem}; export the checkpoint again")
    return Bundle(folder, manifest)


def open_bundle(path: Path | None) -> Bundle:
    """Find a bundle and verify it: see `find_bundle` and `load_bundle`."""
    return load_bundle(find_bundle(path))


def file_problem(path: Path, entry: FileEntry) -> str | None:
    """What is wrong with a file of a bundle, or None. A file of another size is not read."""
    if path.is_symlink() or not path.is_file():
        return "missing, or not a plain file"
    if path.stat().st_size != entry.size_bytes or sha256_of(path) != entry.sha256:
        return "not what was exported (another size or SHA-256)"
    return None


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
        return datetime.fromisoformat(read_manifest(folder).created).timestamp()
    except (UserError, CorruptFileError, ValueError):
        return (folder / MANIFEST_NAME).stat().st_mtime


def now_utc() -> str:
    """The time of an export, as the manifest writes it."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


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
