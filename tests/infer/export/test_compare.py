"""How far models agree: ties, the five best as a set, values that are no numbers; the images compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.common.errors import GateError
from data_pipeline.datasets.image_folder import load_image_folder
from infer.bundle.gate_report import LIMITS
from infer.export.compare import measure_agreement, sample_evenly
from tests.helpers.infer_samples import data_folder


def test_ties_count_as_agreement_and_are_counted() -> None:
    expected = np.array([[0.40005, 0.39995, 0.2], [0.5, 0.3, 0.2]], np.float32)
    found = np.array([[0.39999, 0.40001, 0.2], [0.3, 0.5, 0.2]], np.float32)
    agreement = measure_agreement(expected, found, np.array([0, 0]), LIMITS["fp32"])
    assert (agreement.top1_agreement, agreement.num_ties) == (0.5, 1)
    assert agreement.max_probability_difference == pytest.approx(0.2)
    assert agreement.accuracy == 0


def test_top5_is_compared_as_a_set() -> None:
    expected = np.array([[0.3, 0.2, 0.15, 0.12, 0.1, 0.08, 0.05]], np.float32)
    for swap, share in (((1, 2), 1.0), ((4, 5), 0.0)):
        found = expected.copy()
        found[0, list(swap)] = found[0, list(reversed(swap))]
        assert measure_agreement(expected, found, np.array([0]), LIMITS["fp32"]).top5_agreement == share


@pytest.mark.parametrize("side", [0, 1])
def test_gate_fails_on_a_probability_that_is_not_finite(side: int) -> None:
    values = [np.array([[0.5, 0.5]], np.float32), np.array([[0.5, 0.5]], np.float32)]
    values[side][0, 0] = np.nan
    with pytest.raises(GateError, match="not finite"):
        measure_agreement(values[0], values[1], np.array([0]), LIMITS["fp32"])


def test_large_split_is_sampled_evenly(base: Path) -> None:
    dataset = load_image_folder(data_folder(base), "val")
    few = sample_evenly(dataset, 20)
    assert len(few) == 20 and np.bincount(few.labels).tolist() == [2] * 10
    assert sample_evenly(dataset, 50) is dataset
