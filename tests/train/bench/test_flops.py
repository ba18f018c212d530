"""Operations counted: those that torch counts."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from train.bench.flops import count_flops
from train.config.load import make_config
from train.models.alexnet import make_model


def test_flops_match_torchs_counter() -> None:
    with torch.device("meta"):
        model: nn.Module = make_model(
            make_config("demo", ["model.name=owt"]).model, num_classes=10, crop_px=64
        )
        counter = FlopCounterMode(display=False)
        with counter:
            loss = model(torch.empty(1, 3, 64, 64)).sum()
        forward = counter.get_total_flops()
        with counter:
            loss.backward()
    assert count_flops(model, 64) == forward + counter.get_total_flops() > 3 * 10**8
