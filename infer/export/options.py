"""Options for writing ONNX files and engines, and the choice of the TensorRT library. Loads neither."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from data_pipeline.common.errors import UserError
from infer.bundle.schema import FeatureLayer, Format
from infer.runtime.cuda import GpuScan

# The engine is tuned for this batch, which is also prediction's default.
TUNED_BATCH = 32
MAX_BUILDER_LEVEL = 5
DEFAULT_MAX_BATCH = 64
MAX_MAX_BATCH = 4096
DEFAULT_OPSET = 20
MIN_OPSET, MAX_OPSET = 17, 20


@dataclass(frozen=True)
class OnnxOptions:
    """Options for writing the ONNX files of an export.

    Attributes:
        opset: version of ONNX's operators; older runtimes need a lower one: see `infer.bundle.schema`.
        features: a layer whose features are a second output; None for probabilities alone.
        one_file: whether each file holds all its weights, so that it loads alone, from memory, too.
    Raises:
        UserError: an opset that cannot be written.
    """

    opset: int = DEFAULT_OPSET
    one_file: bool = False
    features: FeatureLayer | None = None

    def __post_init__(self) -> None:
        if not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise UserError(f"--opset {self.opset}: a number from {MIN_OPSET} to {MAX_OPSET}")


@dataclass(frozen=True)
class EngineOptions:
    """Options for building an engine.

    Attributes:
        gpus: architectures to build for, as `sm89`; none for all that the library offers.
        tuned_batch: batch to tune for; None for 32, or the largest if that is less.
        builder_level: 0 builds soonest, 5 searches longest; None for the library's default, 3.
        timing_cache: file with the kernel timings of earlier builds, read if it exists and written
            afterwards. For TensorRT alone: TensorRT-RTX times nothing while it builds.
    Raises:
        UserError: a level out of range.
    """

    gpus: tuple[str, ...] = ()
    tuned_batch: int | None = None
    builder_level: int | None = None
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.builder_level is not None and not 0 <= self.builder_level <= MAX_BUILDER_LEVEL:
            raise UserError(f"--builder-level {self.builder_level}: a number from 0 to {MAX_BUILDER_LEVEL}")

    def asked(self) -> str | None:
        """The first option that was given, as the command line spells it; None if none was."""
        given = {
            "--gpu": self.gpus,
            "--opt-batch": self.tuned_batch is not None,
            "--builder-level": self.builder_level is not None,
            "--timing-cache": self.timing_cache is not None,
        }
        return next((name for name, value in given.items() if value), None)


@dataclass(frozen=True)
class Builder:
    """A TensorRT library that can build here, the GPUs that it builds for, and a note for the log."""

    library: Literal["tensorrt", "tensorrt_rtx"]
    gpus: tuple[str, ...]
    note: str


def choose_builder(versions: dict[str, str], scan: GpuScan, wanted: tuple[str, ...] = ()) -> Builder:
    """Choose `tensorrt` where there is a GPU for it, else `tensorrt_rtx` ahead of time.

    Args:
        versions: the libraries that are installed, as `infer.runtime.choose.tensorrt_versions` lists them.
        scan: the GPUs of this machine.
        wanted: architectures that were asked for; only TensorRT-RTX builds for others than this machine's.
    Returns:
        The builder; no `gpus` means all that the library offers for the precision.
    Raises:
        UserError: neither can build here; the message names the extra to install.
    """
    if "tensorrt" in versions and scan.gpus and set(wanted) <= {scan.gpus[0].architecture}:
        gpu = scan.gpus[0]
        return Builder("tensorrt", (gpu.architecture,), f"for this machine's {gpu.name}")
    if "tensorrt_rtx" in versions:
        why = scan.reason or ("as asked" if wanted else "tensorrt is not installed")
        return Builder("tensorrt_rtx", wanted, f"ahead of time, since {why}")
    if "tensorrt" in versions and scan.gpus:
        raise UserError(
            f"--gpu {','.join(wanted)}: tensorrt builds for this machine's {scan.gpus[0].architecture} "
            "alone; TensorRT-RTX builds for others: pip install 'alexnet[rtx]'"
        )
    if "tensorrt" in versions:
        raise UserError(
            f"tensorrt builds on a GPU only, and {scan.reason}; TensorRT-RTX builds without one: "
            "pip install 'alexnet[rtx]'"
        )
    extra = "alexnet[trt]" if scan.gpus else "alexnet[rtx]"
    raise UserError(
        f"no TensorRT here: pip install '{extra}' (alexnet[trt] builds for this machine's GPU, alexnet[rtx] "
        "ahead of time and without a GPU)"
    )


def profile_batches(max_batch: int, tuned: int | None = None) -> tuple[int, int, int]:
    """Smallest, tuned and largest batch of an engine's one optimisation profile.

    Args:
        max_batch: the largest.
        tuned: batch to tune for; None for the default.
    Raises:
        UserError: a tuned batch above the largest.

    >>> profile_batches(64)
    (1, 32, 64)
    """
    if tuned is not None and not 1 <= tuned <= max_batch:
        raise UserError(f"--opt-batch {tuned}: a number from 1 to {max_batch}, the largest batch")
    return 1, tuned or min(TUNED_BATCH, max_batch), max_batch


def check_max_batch(max_batch: int) -> None:
    """Raise UserError for a largest batch out of range."""
    if not 1 <= max_batch <= MAX_MAX_BATCH:
        raise UserError(f"--max-batch {max_batch}: a number from 1 to {MAX_MAX_BATCH}")


def parse_formats(text: str) -> tuple[Format, ...]:
    """Parse `--format`: the formats in the order given.

    Raises:
        UserError: anything but onnx, trt, or both.

    >>> parse_formats("onnx,trt")
    ('onnx', 'trt')
    """
    names = tuple(text.split(","))
    formats = tuple(known for name in names for known in get_args(Format) if name == known)
    if len(formats) != len(names) or len(set(names)) != len(names):
        raise UserError(f"--format {text}: onnx, trt, or onnx,trt")
    return formats
