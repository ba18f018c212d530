"""Norms of hidden layers become part of the next layer, to the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from infer.export.fold_norms import fold_hidden_norms
from train.config.schema import ModelConfig
from train.models.alexnet import make_model
from train.models.batch_norm import BatchNorm


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        ({"norm": "bn_after_relu", "hidden_norm": True}, 5),
        ({"norm": "bn", "hidden_norm": True}, 7),  # the runtimes fold what stands before a ReLU
        ({"norm": "bn_after_relu"}, 5),
        ({}, 0),
    ],
)
def test_folded_hidden_norms_compute_the_same(keys: dict[str, Any], left: int) -> None:
    torch.manual_seed(0)
    config = ModelConfig(stem_kernel=3, stem_stride=1, pool_padding=1, hidden_units=7, **keys)
    network = make_model(config, num_classes=5, crop_px=8).eval()
    for norm in network.modules():
        if isinstance(norm, BatchNorm):
            for tensor, low in zip((*norm.parameters(), *norm.buffers()), (-0.5, -1, -1, 0.2), strict=False):
                torch.nn.init.uniform_(tensor, low, 1.5)
    images_NCHW = torch.randn(6, 3, 8, 8)
    with torch.no_grad():
        expected = network(images_NCHW)
        fold_hidden_norms(network)
        found = network(images_NCHW)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert expected.std(0).min() > 0.1, "the images make no difference"
    assert sum(isinstance(module, BatchNorm) for module in network.modules()) == left
