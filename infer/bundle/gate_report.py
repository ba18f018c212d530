"""The gate's report in `bundle.json`: how far each file agrees with the checkpoint, and the limits."""

from __future__ import annotations

from infer.bundle.schema import CPU_NAME, ENGINE_NAME, ONNX_NAME, Count, Engine, Precision, Strict


class Limits(Strict, frozen=True):
    """The limits of the gate; agreement and accuracy in 0..1, differences in probability; None is no limit.

    Attributes:
        tie_margin: classes whose probabilities by the reference differ by no more than this count as equal.
        top5_margin: the same at the edge of the five best; None for `tie_margin`.
        max_accuracy_loss: how far the accuracy may lie below the reference's.
        max_feature_difference: of the features, as a share of the largest by the reference.
    """

    min_top1_agreement: float
    min_top5_agreement: float
    max_probability_difference: float | None
    tie_margin: float
    top5_margin: float | None = None
    max_accuracy_loss: float | None = None
    max_feature_difference: float | None = None


LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(
        min_top1_agreement=1.0,
        min_top5_agreement=1.0,
        max_probability_difference=1e-4,
        tie_margin=2e-4,
        max_feature_difference=1e-4,
    ),
    # float16 keeps 11 bits: a probability near one half moves by thousandths.
    "fp16": Limits(
        min_top1_agreement=0.999,
        min_top5_agreement=0.999,
        max_probability_difference=1e-2,
        tie_margin=2e-3,
        max_feature_difference=1e-2,
    ),
    # The best class is compared without ties; int8 makes no promise on the order of the improbable ones.
    "int8": Limits(
        min_top1_agreement=0.99,
        min_top5_agreement=0.99,
        max_probability_difference=None,
        tie_margin=0.0,
        top5_margin=0.05,
        max_accuracy_loss=0.005,
        max_feature_difference=0.25,  # ranges are of a few images: what lies beyond is cut
    ),
}


class Agreement(Strict, frozen=True):
    """One file compared with the reference, over the images of the gate.

    Attributes:
        top1_agreement: share of images with the same best class, ties included.
        top5_agreement: share of images with the same five best classes, ties included.
        num_ties: images whose best class differs, between classes that are equal within `Limits.tie_margin`.
        max_probability_difference: largest difference of any class on any image.
        mean_probability_difference: mean over all classes and images.
        accuracy: top-1 accuracy of the file on these images; None where they have no labels.
        max_feature_difference: largest difference of any feature on any image, as a share of the largest
            by the reference; None of a model without features.
    """

    top1_agreement: float
    top5_agreement: float
    num_ties: Count
    max_probability_difference: float
    mean_probability_difference: float
    accuracy: float | None
    max_feature_difference: float | None = None

    def beyond(self, limits: Limits, reference_accuracy: float | None) -> list[str]:
        """List the limits that are exceeded, one phrase each; empty if the file passes."""
        least = (
            ("top-1 agreement", self.top1_agreement, limits.min_top1_agreement),
            ("top-5 agreement", self.top5_agreement, limits.min_top5_agreement),
        )
        beyond = [f"{what} {value:.2%}, below {limit:.2%}" for what, value, limit in least if value < limit]
        most = limits.max_probability_difference
        if most is not None and self.max_probability_difference > most:
            beyond.append(
                f"a probability differs by {self.max_probability_difference:.2g}, more than {most:g}"
            )
        found, most = self.max_feature_difference, limits.max_feature_difference
        if found is not None and most is not None and found > most:
            beyond.append(f"a feature differs by {found:.2g} of the largest, more than {most:g}")
        if limits.max_accuracy_loss is None:
            return beyond
        if self.accuracy is None or reference_accuracy is None:
            return [*beyond, "accuracy unknown: the images have no labels"]
        loss = reference_accuracy - self.accuracy
        # A hair more than the limit, so that exactly half a point passes in floating point, too.
        if loss > limits.max_accuracy_loss + 1e-9:
            beyond.append(
                f"accuracy {self.accuracy:.2%}, {loss * 100:.2f} points below the reference's; at most "
                f"{limits.max_accuracy_loss * 100:g}"
            )
        return beyond


class GateReport(Strict, frozen=True):
    """The comparison of each file with the checkpoint, which the export passed.

    Attributes:
        data, split: the validation images, or what they are where they are no data set.
        num_images, num_available, num_failed: those compared, those of the split, those that are unreadable.
        checkpoint_accuracy: None where the images have no labels.
        engine_not_run: why the engine was not compared; None where it was, or where there is none.
    """

    data: str
    split: str
    num_images: Count
    num_available: Count
    num_failed: Count
    checkpoint_accuracy: float | None
    limits: Limits
    onnx: Agreement
    onnx_provider: str
    engine: Agreement | None = None
    engine_not_run: str | None = None
    cpu: Agreement | None = None

    @property
    def agreements(self) -> dict[str, Agreement]:
        """The agreement of each file that was compared, by the file's name."""
        every = {ONNX_NAME: self.onnx, CPU_NAME: self.cpu, ENGINE_NAME: self.engine}
        return {name: found for name, found in every.items() if found is not None}


class Rebuild(Strict, frozen=True):
    """An engine that was built from `model.onnx` after the export, where there was no checkpoint.

    The gate's report holds for `model.onnx`, whose bytes are the same; for the engine it is replaced by this.

    Attributes:
        created: when, in UTC.
        replaces: the engine that was there; None where there was none.
        data, split: the images on which the new engine was compared with `model.onnx`; empty for none.
        num_images, num_failed: how many were compared, and how many could not be read.
        onnx_accuracy: top-1 accuracy of `model.onnx` on them.
        agreement: of the engine with `model.onnx`; None where they were not compared.
        unknown: why they were not; None where they were.
    Raises:
        ValueError: neither compared nor a reason why not, or both.
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
        compared = self.agreement is not None
        if compared != (self.unknown is None) or compared != (self.onnx_accuracy is not None):
            raise ValueError("an engine that was built again was either compared or it was not")
