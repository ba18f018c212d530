"""Comparison of two runs' states: bit for bit."""

from __future__ import annotations

import torch

from scripts.soak.compare import equal_trees


def test_soak_states_are_equal_only_bit_for_bit() -> None:
    one = {"model": {"w": torch.tensor([1.0, 2.0])}, "steps": [1, 2]}
    assert equal_trees(one, {"model": {"w": torch.tensor([1.0, 2.0])}, "steps": [1, 2]})
    assert not equal_trees(one, {"model": {"w": torch.tensor([1.0, 2.0 + 2.0**-22])}, "steps": [1, 2]})
    assert not equal_trees(
        one, {"model": {"w": torch.tensor([1.0, 2.0], dtype=torch.float64)}, "steps": [1, 2]}
    )
    assert not equal_trees(one, {"model": {}, "steps": [1, 2]})
