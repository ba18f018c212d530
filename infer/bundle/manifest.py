"""What an export says for itself: the engine, the proof of its precision, and the gate's verdict."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

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
