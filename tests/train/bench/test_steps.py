"""The cases of `alexnet bench train`: images on the device, and networks without their norms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from train.bench.steps import OurSteps, TorchvisionSteps
from train.bench.subjects import make_specs
from train.config.schema import ModelConfig
from train.distributed.world import open_world
from train.models.alexnet import make_model
from train.models.batch_norm import BatchNorm
from train.models.lrn import LocalResponseNorm

# Shapes: N images, H and W rows and columns, C channels.


def test_bn_without_norms_has_its_other_layers_alone(tmp_path: Path) -> None:
    (spec,) = make_specs(["bn_no_norm"], [2], "fp32", "cpu")
    with open_world("cpu") as world:
        case = OurSteps(world, spec, 64, tmp_path)
        assert isinstance(case.sample.images, torch.Tensor) and case.sample.images.shape == (2, 64, 64, 3)
        counts = case.step()
        assert counts.integers[0] == 2 and torch.isfinite(counts.loss_sum)
        network = case.network
        names = [type(layer).__name__ for layer in network.features]
        assert names[:6] == ["Conv2d", "ReLU", "MaxPool2d"] * 2 and len(names) == 13
        assert all(layer.bias is None for layer in network.features if isinstance(layer, nn.Conv2d))
    whole = make_model(ModelConfig(name="bn"), num_classes=2, crop_px=224).features
    assert sum(isinstance(layer, BatchNorm) for layer in whole) == 5, "only the case has none"
    paper = make_model(ModelConfig(name="paper"), num_classes=2, crop_px=224).features
    assert sum(isinstance(layer, LocalResponseNorm) for layer in paper) == 2


def test_torchvision_trains_from_bytes_in_its_tuned_way(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda _self, mode: modes.append(mode))
    (plain,) = make_specs(["torchvision_amp"], [2], "fp32", "cpu")
    (tuned,) = make_specs(["torchvision_graphs"], [2], "fp32", "cuda")
    case = TorchvisionSteps(tuned, 64, torch.device("cpu"))
    assert modes == ["reduce-overhead"]
    assert case.images_NHWC.dtype == torch.uint8
    first = next(case.model.parameters())
    assert first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    before = first.detach().clone()
    figures = case.profile()
    assert not torch.equal(first, before) and torch.isfinite(first).all()
    assert figures["operators"] is not None and figures["operators"] > 50 and figures["kernel_ms"] is None
    assert case.optimizer.defaults["fused"] and not case.scaler.is_enabled()
    assert plain.precision == "bf16" and not plain.tuned
