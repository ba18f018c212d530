"""Weights of the classes: their scale, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.dataset import Dataset
from train.config.load import make_config
from train.optim.class_weights import (
    check_balance,
    class_weights_of,
    counts_in_epoch,
    describe_balance,
    describe_weights,
)


def data_of(*labels: int) -> Dataset:
    names, classes = tuple(map(str, range(len(labels)))), ("a", "b", "c")
    return Dataset(Path("d"), "train", names, np.array(labels, np.int64), classes, ("ant", "bee", "cat"))


@pytest.mark.parametrize(
    ("wanted", "ratios"), [("balanced", [6, 3, 2]), ("[2, 2, 2]", [1, 1, 1]), ("[1, 0.5, 4]", [2, 1, 8])]
)
def test_weights_have_a_mean_of_one_over_the_samples(wanted: str, ratios: list[float]) -> None:
    data = data_of(0, 2, 1, 2, 1, 2)
    weights = class_weights_of(make_config("demo", [f"class_weights={wanted}"]), data)
    assert weights is not None
    assert weights[data.labels].sum() == pytest.approx(len(data))
    assert weights / weights[0] == pytest.approx(np.array(ratios) / ratios[0])


def test_balanced_epochs_and_weights_share_one_correction() -> None:
    """Classes that `data.balance` draws equally often need no weights."""
    data = data_of(0, 1, 1, 2, 2, 2, 2, 2, 2)
    both = make_config("demo", ["class_weights=balanced", "data.balance=1"])
    assert counts_in_epoch(both, data).tolist() == [3, 3, 3]
    assert class_weights_of(both, data) == pytest.approx(np.ones(3))
    assert describe_balance(both, data) == (
        "in an epoch the 1 image(s) of ant come 3 times, the 6 image(s) of cat come 3 times (data.balance 1)"
    )
    with pytest.raises(UserError, match=r"^data.balance is 0.5, and 1 class\(es\) of d/train have no image"):
        check_balance(make_config("demo", ["data.balance=0.5"]), data_of(0, 1))


def test_all_classes_weigh_the_same_by_default() -> None:
    assert class_weights_of(make_config("demo"), data_of(0, 1, 1)) is None


def test_weights_are_described_by_the_extremes() -> None:
    weights = np.array([0.5, 2.0, 1.25])
    assert describe_weights(weights, data_of(0, 1, 2)) == (
        "the training loss weighs classes from 0.5 (ant) to 2 (bee) (class_weights)"
    )


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            "balanced",
            "class_weights is balanced, and 2 class(es) of d/train have no image (a, c): give them images, "
            "or take them out of the data",
        ),
        (
            "[1, 2]",
            "class_weights has 2 value(s), and d/train has 3 classes: give one for each, in the order of "
            "their names",
        ),
    ],
)
def test_weights_of_other_classes_are_refused(wanted: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        class_weights_of(make_config("demo", [f"class_weights={wanted}"]), data_of(1, 1))
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("[1, 0.0]", "class_weights[1]: Expected `float` > 0.0"),
        ("even", "class_weights: Invalid enum value 'even'; it is one of none, balanced or a list"),
    ],
)
def test_weights_out_of_range_are_refused(wanted: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        make_config("demo", [f"class_weights={wanted}"])
    assert str(refused.value) == f"configuration: {message}"
