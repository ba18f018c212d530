"""Rows: the most probable classes of an image, or the reason why it could not be read."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.errors import UserError
from infer.bundle.load import Bundle

DEFAULT_BATCH = 32
DEFAULT_TOP = 5


class Prediction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One class of one image.

    Attributes:
        class_id: the place of the class among the model's.
        class_name: as the data has it (`n01443537`); `class` in files. None, and in no file, where the data
            names no class for people: then the label is that name.
        label: the name for people (`goldfish`).
    """

    class_id: int
    class_name: str | None = msgspec.field(default=None, name="class")
    label: str
    probability: Annotated[float, msgspec.Meta(ge=0, le=1)]


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """The true class of an image, and its place among all by probability: 1 where it was recognised."""

    class_id: int
    label: str
    rank: Annotated[int, msgspec.Meta(ge=1)]


class OkRow(msgspec.Struct, frozen=True, kw_only=True):
    """An image that was predicted; the most probable class comes first. `truth` is there if asked for."""

    path: str
    status: Literal["ok"] = "ok"
    predictions: tuple[Prediction, ...]
    truth: Truth | msgspec.UnsetType = msgspec.UNSET


class FeatureRow(OkRow, frozen=True, kw_only=True, eq=False):
    """An image that was predicted, with what a layer computed: float32 (length,)."""

    features: NDArray[np.float32]


class ErrorRow(msgspec.Struct, frozen=True, kw_only=True):
    """An input that cannot be read as an image, and the reason."""

    path: str
    status: Literal["error"] = "error"
    error: str


Row = OkRow | ErrorRow


class Rank(msgspec.Struct, frozen=True):
    """As much of a row's truth as counts for the accuracy."""

    rank: Annotated[int, msgspec.Meta(ge=1)]


class CompletedRow(msgspec.Struct, frozen=True):
    """A row of an earlier run: its path as written, whether it is an error, and the rank of its truth."""

    path: str
    status: Literal["ok", "error"]
    truth: Rank | None = None


class ClassNames(NamedTuple):
    """The names of a model's classes, by class id.

    Attributes:
        labels: for people.
        in_data: as the data has them; empty where its labels are nothing else.
    """

    labels: tuple[str, ...]
    in_data: tuple[str, ...] = ()


def names_of(bundle: Bundle) -> ClassNames:
    """The names of a bundle's classes."""
    manifest = bundle.manifest
    return ClassNames(manifest.class_labels, manifest.classes if manifest.labels_text else ())


class RowShape(NamedTuple):
    """Properties that all rows of a run share.

    Attributes:
        places: most classes in a row.
        named: whether a class has its name in the data beside its label.
        truth: whether a row has the true class.
    """

    places: int
    named: bool
    truth: bool = False


class PredictionWithPixels(NamedTuple):
    """A row, and the pixels that the model saw: (crop, crop, 3) uint8 RGB.

    They are None for an error row, and where nobody asked for pixels.
    """

    row: Row
    pixels: NDArray[np.uint8] | None


def check_top(bundle: Bundle, top: int | None) -> int:
    """Number of classes in a row: `top`, or by default five, or all if the model has fewer.

    Raises:
        UserError: below 1 or above the number of classes.
    """
    count = len(bundle.manifest.classes)
    if top is not None and not 1 <= top <= count:
        raise UserError(f"--top {top}: the model has {count} classes; use 1 to {count}")
    return top or min(DEFAULT_TOP, count)


def top_k(probabilities_NC: NDArray[np.float32], names: ClassNames, k: int) -> list[tuple[Prediction, ...]]:
    """The `k` most probable classes of each image, the best first.

    >>> top_k(np.array([[0.25, 0.75]], np.float32), ClassNames(("cat", "dog")), 1)
    [(Prediction(class_id=1, class_name=None, label='dog', probability=0.75),)]
    """
    classes, labels = names.in_data or (None,) * len(names.labels), names.labels
    return [
        tuple(
            Prediction(
                class_id=int(c), class_name=classes[c], label=labels[c], probability=min(float(row_C[c]), 1.0)
            )
            for c in ranked_K
        )
        for row_C, ranked_K in zip(probabilities_NC, rank_classes(probabilities_NC, k), strict=True)
    ]


def rank_of(row_C: NDArray[np.float32], place: int) -> int:
    """The place of a class in the order of `rank_classes`, from 1 on.

    >>> rank_of(np.array([0.25, 0.5, 0.25], np.float32), 2)
    3
    """
    return 1 + int((row_C > row_C[place]).sum()) + int((row_C[:place] == row_C[place]).sum())


def rank_classes(probabilities_NC: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """The `k` most probable classes of each image, (N, k), the best first.

    The sort is stable: of equal probabilities the lower class comes first, on every machine.
    """
    return np.argsort(-probabilities_NC, axis=1, kind="stable")[:, :k]
