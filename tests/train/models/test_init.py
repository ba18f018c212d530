"""Networks without initial weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from train.config.schema import Init, ModelConfig
from train.models.alexnet import make_model
from train.models.init import Uninitialized


@pytest.mark.parametrize("init", ["he", "paper", "caffe", "torch"])
def test_uninitialized_network_draws_nothing(init: Init) -> None:
    keys: dict[str, Any] = {"name": "bn", "init": init, "stem_stride": 2, "hidden_units": 8, "norm_batch": 4}

    def network() -> torch.nn.Module:
        return make_model(ModelConfig(**keys), num_classes=3, crop_px=56)

    torch.manual_seed(0)
    plain = network()
    drawn = torch.get_rng_state()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with Uninitialized():
        empty = network()
    assert torch.equal(torch.get_rng_state(), before) and not torch.equal(drawn, before)
    assert {n: (p.shape, p.stride()) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.stride()) for n, p in plain.named_parameters()
    }
    for (name, ours), (_, theirs) in zip(empty.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    empty.load_state_dict(plain.state_dict())
    images_NCHW = torch.ones(2, 3, 56, 56)
    assert torch.equal(empty.eval()(images_NCHW), plain.eval()(images_NCHW))
    torch.manual_seed(0)
    drawn_again = network().parameters()
    assert all(map(torch.equal, drawn_again, plain.parameters())), "drawing is off after the context"
