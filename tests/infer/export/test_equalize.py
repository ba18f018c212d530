"""Equalised ranges: the same function, and channels of one range."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from data_pipeline.transforms.preprocessing import Preprocessing
from infer.export.equalize import equalize_ranges
from train.config.schema import ModelConfig
from train.models.alexnet import AlexNet, FeatureLayer, Normalize, make_model
from train.models.batch_norm import BatchNorm

CROP_PX = 40
NORMALIZE = Normalize(Preprocessing(crop_px=CROP_PX, resize_px=CROP_PX)).double()
BEHIND_RELU = ModelConfig(
    name="paper", stem_kernel=5, stem_stride=2, norm="bn_after_relu", hidden_norm=True, hidden_units=24,
    pool_padding=1,
)  # fmt: skip
IMAGES_NHWC = np.random.default_rng(0).integers(0, 256, (6, CROP_PX, CROP_PX, 3), dtype=np.uint8)


def make_network(config: ModelConfig) -> AlexNet:
    """A network in float64 as training leaves it: norms of all scales and signs, some channels dead."""
    torch.manual_seed(0)
    network = make_model(config, num_classes=7, crop_px=CROP_PX).double().eval()
    for norm in norms_of(network):
        count = norm.num_features
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(torch.rand(count))
        norm.running_var.copy_(10 ** (torch.rand(count) * 6 - 5))
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        with torch.no_grad():
            norm.weight[::7] = 0.0
    return network


def norms_of(network: AlexNet) -> list[BatchNorm]:
    """The norms of a network."""
    return [module for module in network.modules() if isinstance(module, BatchNorm)]


def outputs(network: AlexNet, layer: FeatureLayer) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and features of the images."""
    with torch.no_grad():
        logits_NC, features_ND = network.forward_features(NORMALIZE(torch.from_numpy(IMAGES_NHWC)), layer)
    return logits_NC, features_ND


def test_equalized_channels_have_similar_ranges() -> None:
    network = make_network(BEHIND_RELU)
    before = spread_of(network)
    equalize_ranges(network, NORMALIZE, [IMAGES_NHWC])
    assert before > 100
    assert spread_of(network) < 1.1 * before**0.5  # the weights behind take the other half


def spread_of(network: AlexNet) -> float:
    """How many times the median channel's range the largest one is, behind the fourth norm."""
    found: list[torch.Tensor] = []
    norm = network.features.get_submodule("norm4")
    handle = norm.register_forward_hook(lambda module, inputs, output: found.append(output))
    outputs(network, "fc7")
    handle.remove()
    ranges_C = found[0].abs().amax((0, 2, 3))
    return float(ranges_C.max() / ranges_C.median())


def test_norms_before_relu_are_left_alone() -> None:
    network = make_network(msgspec.structs.replace(BEHIND_RELU, norm="bn"))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert equalize_ranges(network, NORMALIZE, [IMAGES_NHWC]) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.usefixtures("thin")  # from here to the end of the file
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layer", get_args(FeatureLayer))
def test_equalized_network_is_the_same_function(groups: Literal[1, 2], layer: FeatureLayer) -> None:
    network = make_network(msgspec.structs.replace(BEHIND_RELU, groups=groups))
    before = outputs(network, layer)
    assert equalize_ranges(network, NORMALIZE, [IMAGES_NHWC], layer) == 7
    for old, new in zip(before, outputs(network, layer), strict=True):
        assert (new - old).abs().max() < 1e-9 * old.abs().max()
