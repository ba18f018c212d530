"""Kernels that repeat their bits: what is set for a run, and restored after it."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from train.distributed.numerics import WORKSPACE, repeated_bits
from train.distributed.world import open_world


def settings() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark,
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        os.environ.get(WORKSPACE),
    )  # fmt: skip


def test_run_chooses_kernels_by_time_unless_bits_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)
    before = settings()
    with open_world("cpu"):
        assert settings() == (False, False, True, True, None)
    with open_world("cpu", deterministic=True):
        assert settings() == (True, True, False, False, ":4096:8")
    assert settings() == before


@pytest.mark.parametrize(("own", "used"), [(":16:8", ":16:8"), (":4096:8", ":4096:8"), (":0:0", ":4096:8")])
def test_workspace_of_the_user_stays_if_its_sums_repeat(
    own: str, used: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(WORKSPACE, own)
    with caplog.at_level(logging.INFO, "train"), repeated_bits(True):
        assert os.environ[WORKSPACE] == used
    assert os.environ[WORKSPACE] == own
    assert caplog.messages == [] if own == used else [
        "CUBLAS_WORKSPACE_CONFIG is :0:0, with which cuBLAS does not repeat its bits: :4096:8 is used "
        "(deterministic=true)"
    ]  # fmt: skip


def test_settings_of_a_caller_come_back_after_an_error() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = settings()
        with pytest.raises(ArithmeticError), repeated_bits(True):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise ArithmeticError
        assert settings() == before and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
