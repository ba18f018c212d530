"""Tolerances between two steps: rounding is allowed, one percent is not."""

from __future__ import annotations

import pytest
import torch

from train.graphs.agreement import EXACT, NARROW, NONE, Gap, gap_between, worst_of

torch.manual_seed(0)
WANT = torch.randn(400)
NOISE = torch.randn(400)


def test_gap_is_relative_and_its_share_is_a_factor() -> None:
    gap = gap_between(WANT * 1.01, WANT)
    assert gap.distance == pytest.approx(0.01, rel=1e-4) and gap.share == pytest.approx(0.01, rel=1e-4)
    sideways = NOISE - WANT * (NOISE @ WANT) / (WANT @ WANT)
    gap = gap_between(WANT + 0.1 * sideways, WANT)
    assert gap.distance == pytest.approx(0.1, rel=0.2) and gap.share < 1e-5


def test_slack_is_not_counted() -> None:
    length = float(WANT.norm())
    assert gap_between(WANT * 1.01, WANT, slack=0.011 * length) == NONE
    gap = gap_between(WANT * 1.01, WANT, slack=0.004 * length)
    assert gap.distance == pytest.approx(0.006, rel=1e-3) == gap.share


def test_what_is_not_finite_or_should_be_nothing_is_far() -> None:
    nothing, infinite = torch.zeros(400), Gap(float("inf"), float("inf"))
    for found, want in ((WANT * float("nan"), WANT), (WANT / 0, WANT), (nothing + 1e-9, nothing)):
        assert gap_between(found, want) == infinite
    assert gap_between(nothing, nothing) == NONE


@pytest.mark.parametrize(
    ("gap", "usual", "against"),
    [
        (Gap(9e-3, 9e-4), NONE, None),
        (Gap(0.011, 0.0), NONE, "x is off by 0.011"),
        (Gap(0.005, 0.005), NONE, "x is too large or too small by 0.005"),
        (Gap(0.19, 0.05), Gap(0.1, 0.03), None),  # not twice what rounding does
        (Gap(0.21, 0.05), Gap(0.1, 0.03), "x is off by 0.21"),
        (Gap(0.19, 0.1), Gap(0.1, 0.03), "x is too large or too small by 0.1"),
        (Gap(0.19, 0.07), Gap(0.1, 0.03), "x is off by 0.19"),
        (Gap(float("inf"), float("inf")), Gap(0.1, 0.03), "x is off by inf"),
    ],
)
def test_gaps_as_far_as_rounding_goes_are_near(gap: Gap, usual: Gap, against: str | None) -> None:
    assert worst_of({"x": gap}, {"x": usual}, EXACT) == against


def test_tensor_may_be_as_far_off_as_the_farthest_is() -> None:
    usual = {"x": Gap(0.02, 0.0), "y": Gap(0.09, 0.0)}
    assert worst_of({"x": Gap(0.08, 0.0)}, usual, EXACT) is None
    assert worst_of({"x": Gap(0.1, 0.0)}, usual, EXACT) == "x is off by 0.1"


def test_share_is_allowed_as_any_tensors_is_off() -> None:
    usual = {"x": NONE, "y": Gap(0.05, 0.02)}
    assert worst_of({"x": Gap(0.01, 0.01)}, usual, EXACT) is None
    assert worst_of({"x": Gap(0.01, 0.01)}, usual | {"y": NONE}, EXACT) is not None
    assert worst_of({"x": Gap(0.02, 0.01)}, usual | {"y": NONE}, NARROW) is None


def test_the_farthest_tensor_is_named() -> None:
    gaps = {"a": Gap(0.5, 0.1), "b": Gap(0.9, 0.0), "c": NONE}
    found = worst_of(gaps, dict.fromkeys(gaps, NONE), EXACT)
    assert found == "b is off by 0.9, and 1 more tensor(s) are"
