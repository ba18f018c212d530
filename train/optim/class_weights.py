"""Data in which classes are not equally frequent: their share of an epoch, and their weight in the loss."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.transforms.sampler import class_quotas
from train.config.schema import RunConfig

# Shapes: C classes.

NUM_SHOWN = 3
"""Most classes that a message names."""


def counts_in_epoch(config: RunConfig, train_set: Dataset) -> npt.NDArray[np.float64]:
    """Return how many samples of each class an epoch has, (C).

    Raises:
        UserError: a class without images that `data.balance` is to make frequent.
    """
    if config.data.balance and len(train_set):
        refuse_empty_classes(train_set, f"data.balance is {config.data.balance:g}")
    counts_C = np.bincount(train_set.labels, minlength=len(train_set.classes))
    return class_quotas(counts_C, config.data.balance).astype(np.float64)


def check_balance(config: RunConfig, train_set: Dataset) -> None:
    """Refuse what the functions below would, before a run's images are looked at."""
    counts_in_epoch(config, train_set)
    class_weights_of(config, train_set)


def class_weights_of(config: RunConfig, train_set: Dataset) -> npt.NDArray[np.float64] | None:
    """Return the weight of each class in the training loss, with a mean of 1 over the samples of an epoch.

    `balanced` gives every class the same sum of weights; weights that are listed keep their ratios.

    Returns:
        (C), above 0; None where all classes weigh the same, and for a bench's data without samples.
    Raises:
        UserError: not a weight for each class, or a class without images that is to be balanced.
    """
    wanted = config.class_weights
    if wanted == "none" or len(train_set) == 0:
        return None
    counts_C = counts_in_epoch(config, train_set)
    where = f"{printable(train_set.root)}/{train_set.split}"
    if wanted == "balanced":
        refuse_empty_classes(train_set, "class_weights is balanced")
        weights_C = 1 / counts_C
    else:
        weights_C = np.array(wanted, dtype=np.float64)
        if len(weights_C) != len(counts_C):
            raise UserError(
                f"class_weights has {len(weights_C)} value(s), and {where} has {len(counts_C)} classes: give "
                "one for each, in the order of their names"
            )
    mean: np.float64 = (weights_C * counts_C).sum() / counts_C.sum()
    return weights_C / mean


def refuse_empty_classes(train_set: Dataset, why: str) -> None:
    """Refuse classes without a training image.

    Args:
        why: begins the message: what they are in the way of.
    Raises:
        UserError: naming the first few.
    """
    counts_C = np.bincount(train_set.labels, minlength=len(train_set.classes))
    empty = [printable(train_set.classes[c]) for c in np.flatnonzero(counts_C == 0)]
    if empty:
        more = f" and {len(empty) - NUM_SHOWN} more" if len(empty) > NUM_SHOWN else ""
        raise UserError(
            f"{why}, and {len(empty)} class(es) of {printable(train_set.root)}/{train_set.split} have no "
            f"image ({', '.join(empty[:NUM_SHOWN])}{more}): give them images, or take them out of the data"
        )


def describe_balance(config: RunConfig, train_set: Dataset) -> str:
    """Describe an epoch's share of the classes for the log."""
    counts_C, quotas_C = np.bincount(train_set.labels), counts_in_epoch(config, train_set)
    rare, frequent = int(counts_C.argmin()), int(counts_C.argmax())
    names = [
        f"the {counts_C[c]} image(s) of {printable(train_set.class_labels[c])} come {quotas_C[c]:.0f} times"
        for c in (rare, frequent)
    ]
    return f"in an epoch {', '.join(names)} (data.balance {config.data.balance:g})"


def describe_weights(weights_C: npt.NDArray[np.float64], train_set: Dataset) -> str:
    """Describe the weights for the log."""
    least, most = int(weights_C.argmin()), int(weights_C.argmax())
    names = train_set.class_labels
    return (
        f"the training loss weighs classes from {weights_C[least]:.3g} ({printable(names[least])}) to "
        f"{weights_C[most]:.3g} ({printable(names[most])}) (class_weights)"
    )
