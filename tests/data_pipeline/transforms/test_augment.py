"""The configuration of the augmentation says what is allowed."""

from __future__ import annotations

import msgspec
import pytest

from data_pipeline.transforms.augment import Augment


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": (0.0, 1.0)}, "0 < low <= high <= 1"),
        ({"scale": (0.5, 1.5)}, "0 < low <= high <= 1"),
        ({"ratio": (2.0, 1.0)}, "0 < low <= high"),
        ({"flip": 1.5}, "probability, 0 to 1, not 1.5"),
        ({"flip": float("nan")}, "probability"),
        ({"crop": "centre"}, "Invalid enum value 'centre'"),
    ],
)
def test_augment_error_says_what_is_allowed(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        msgspec.convert(values, Augment)


def test_augment_error_says_which_values_are_allowed() -> None:
    for wrong, text in (
        ({"hue": 0.6}, "hue must be 0"),
        ({"mixup": 0.01}, "Beta distribution's alpha"),
        ({"mix_probability": 1.5}, "mix_probability is a probability, 0 to 1, not 1.5"),
        ({"erase": -0.1}, "erase is a probability, 0 to 1, not -0.1"),
        ({"erase": float("nan")}, "erase is a probability"),
        ({"pca_eigenvectors": ((1, 1, 0), (0, 1, 0), (0, 0, 1))}, "length 1"),
    ):
        with pytest.raises(ValueError, match=text):
            Augment(**wrong)
