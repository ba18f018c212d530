"""The choice of a number format."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.common.errors import UserError
from train.optim.precision import choose_precision

CPU = torch.device("cpu")


def test_precision_has_a_reason() -> None:
    assert choose_precision("fp32", CPU).reason == "asked for"
    chosen = choose_precision("auto", CPU)
    assert chosen.name in ("bf16", "fp32")
    assert "CPU" in chosen.reason or "hardware" in chosen.reason
    assert not chosen.make_scaler().is_enabled()


def test_float16_needs_a_gpu() -> None:
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", CPU)
