"""Names, field types and parts of `bundle.json`; `gate_report` has the gate's, `manifest` the whole.

`words` of a part describes it for people, in a line.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec

from data_pipeline.results.card import InitRecord

MANIFEST_NAME = "bundle.json"
ONNX_NAME = "model.onnx"
CPU_NAME = "model.cpu.onnx"
ENGINE_NAME = "model.engine"
INPUT_NAME = "images"
OUTPUT_NAME = "probabilities"

Format = Literal["onnx", "trt"]
Precision = Literal["fp32", "fp16", "int8"]
FeatureLayer = Literal["fc7", "fc6", "pool5"]
Count = Annotated[int, msgspec.Meta(ge=0)]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]

OPSET_SINCE = {17: "1.12", 18: "1.14", 19: "1.16", 20: "1.17", 21: "1.18"}
IR_SINCE = {8: "1.12", 9: "1.15", 10: "1.18"}
"""The versions of ONNX Runtime that load a file, by its opset and its IR version.

IR 8 is older than 1.12, the first that has any opset of ours. Measured with wheels of ONNX Runtime 1.11 to
1.17. Its docs/Versioning.md says the same, except that it claims opset 19 for 1.15, whose CPU provider has no
`Cast` of opset 19.
"""


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every part of the manifest: immutable, and an unknown key is an error."""


class TensorSpec(Strict, frozen=True):
    """An input or output of the model; a name in `shape` is a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class FileEntry(Strict, frozen=True):
    """Hash and size of a file of the bundle."""

    sha256: Sha256
    size_bytes: Count


class Origin(Strict, frozen=True):
    """The checkpoint that was exported.

    Attributes:
        model: the network's name, and the keys that change its layers.
        init: None where the seed made the first weights.
        weights: those of its last step, or their average over training.
        metrics: of the validation split, those that are finite.
    """

    sha256: Sha256
    step: Count
    epoch: Count
    recipe: str
    model: str
    weights: Literal["last", "average"] = "last"
    metrics: dict[str, float] = msgspec.field(default_factory=dict)
    init: InitRecord | None = None


class Engine(Strict, frozen=True):
    """A TensorRT plan: who built it, and on which GPUs it loads (`sm89`, ...).

    Attributes:
        profile_batches: smallest, tuned and largest batch of its one optimisation profile.
        builder_level: the builder's optimisation level.
        built_on: the GPU that it was timed on; empty for one that was built ahead of time.
    """

    library: Literal["tensorrt", "tensorrt_rtx"]
    version: str
    gpus: tuple[Annotated[str, msgspec.Meta(pattern="^sm[0-9]+[a-z]?$")], ...]
    profile_batches: tuple[int, int, int]
    builder_level: int
    built_on: str = ""

    def words(self) -> str:
        """`tensorrt 11.0, loads on GPUs of sm89; batches of 1 to 64, tuned for 32, builder level 3`."""
        smallest, tuned, largest = self.profile_batches
        timed = f", timed on {self.built_on}" if self.built_on else ""
        return (
            f"{self.library} {self.version}, loads on GPUs of {', '.join(self.gpus)}; batches of {smallest} "
            f"to {largest}, tuned for {tuned}, builder level {self.builder_level}{timed}"
        )


class Calibration(Strict, frozen=True):
    """The training images that the ranges of an int8 model come from."""

    data: str
    split: str
    num_images: Count
    method: Literal["minmax"]

    def words(self) -> str:
        """`calibrated on 256 images of digits/train (minmax)`."""
        return f"calibrated on {self.num_images} images of {self.data}/{self.split} ({self.method})"


class PrecisionCheck(Strict, frozen=True):
    """The precision of an ONNX file, as read from the file.

    Attributes:
        computed_in: for each kind of operator, how many take which type.
        num_values: stored weights by type.
        num_quantize, num_dequantize: number of QuantizeLinear and DequantizeLinear nodes.
        opset, ir_version: the versions of ONNX that a runtime must support.
    """

    computed_in: dict[str, dict[str, int]]
    num_values: dict[str, int]
    num_quantize: Count
    num_dequantize: Count
    opset: int
    ir_version: int

    def words(self) -> str:
        """`Conv float16, Gemm float16, LRN float; 0 Q and 0 DQ nodes`."""
        kinds = ", ".join(f"{name} {'/'.join(types)}" for name, types in self.computed_in.items())
        return f"{kinds}; {self.num_quantize} Q and {self.num_dequantize} DQ nodes"

    def runtime_words(self) -> str | None:
        """`ONNX Runtime 1.17 or later (opset 20, IR 9)`; None for versions that are not ours."""
        if self.opset not in OPSET_SINCE or self.ir_version not in IR_SINCE:
            return None
        since = max(OPSET_SINCE[self.opset], IR_SINCE[self.ir_version])
        return f"ONNX Runtime {since} or later (opset {self.opset}, IR {self.ir_version})"


class CpuModel(Strict, frozen=True):
    """The form of the model that ONNX Runtime's CPU provider runs, where it is not `model.onnx` itself.

    Attributes:
        file: its name in the bundle.
        reads: the file beside it that holds the weights which it does not hold itself: it loads neither
            alone nor from memory. Empty where it holds all.
        precision_check: as read from the file; the sums of LRN, always in float32, are not counted.
    """

    file: str
    reads: str
    precision_check: PrecisionCheck = msgspec.field(name="proof")

    def words(self) -> str:
        """`for ONNX Runtime on a CPU, reads its weights from model.onnx beside it; Conv float, …`."""
        weights = f", reads its weights from {self.reads} beside it" if self.reads else ""
        return f"for ONNX Runtime on a CPU{weights}; {self.precision_check.words()}"


def image_input(crop_px: int) -> TensorSpec:
    """The one input of every bundle: uint8 RGB, NHWC."""
    return TensorSpec(name=INPUT_NAME, dtype="uint8", shape=("batch", crop_px, crop_px, 3))


def probability_output(num_classes: int) -> TensorSpec:
    """The first output of every bundle: softmax over the classes."""
    return TensorSpec(name=OUTPUT_NAME, dtype="float32", shape=("batch", num_classes))


def feature_output(layer: FeatureLayer, length: int) -> TensorSpec:
    """The second output of a bundle that gives features: what a layer computes, named after it."""
    return TensorSpec(name=layer, dtype="float32", shape=("batch", length))


def is_feature_output(spec: TensorSpec) -> bool:
    """Whether an output is one that `feature_output` describes."""
    length = spec.shape[-1] if spec.shape else 0
    if not isinstance(length, int) or length < 1:
        return False
    return any(spec == feature_output(layer, length) for layer in get_args(FeatureLayer))
