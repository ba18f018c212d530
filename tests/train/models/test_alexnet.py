"""The AlexNet family against its sources: torchvision, Caffe's ONNX file, the paper's counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime
import pytest
import torch
import torchvision
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from data_pipeline.transforms.preprocessing import Preprocessing
from tests.helpers.bvlc import bvlc_file
from train.config.schema import Init, ModelConfig
from train.models.alexnet import (
    AlexNet,
    FeatureLayer,
    Normalize,
    count_features,
    feature_map,
    make_features,
    make_model,
)
from train.models.dropout import Dropout
from train.models.init import Uninitialized
from train.models.lrn import LocalResponseNorm

PARAMETERS = {"paper": 60_965_224, "caffe": 60_965_224, "owt": 61_100_840, "bn": 60_966_600}


def tiny(name: str, init: Init = "he", num_classes: int = 10) -> AlexNet:
    return make_model(
        ModelConfig(name=name, stem_stride=2, init=init, hidden_units=512),  # type: ignore[arg-type]
        num_classes=num_classes,
        crop_px=56,
    )


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_published_ones(name: str) -> None:
    config = ModelConfig(name=name)  # type: ignore[arg-type]
    with Uninitialized():
        model = make_model(config, num_classes=1000, crop_px=227 if name == "caffe" else 224)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


CONVOLUTIONS = 34_944 + 614_656 + 885_120 + 1_327_488 + 884_992  # each kernel x inputs x outputs, and biases
FC6, FC7, FC8 = 4096 * 512 + 512, 512 * 512 + 512, 512 * 200 + 200
NORMS = 2 * (96 + 256 + 384 + 384 + 256)


@pytest.mark.parametrize(
    ("changed", "parameters"),
    [
        ({}, CONVOLUTIONS + FC6 + FC7 + FC8),
        ({"norm": "none"}, CONVOLUTIONS + FC6 + FC7 + FC8),
        ({"stem_kernel": 5}, CONVOLUTIONS - 96 * 3 * (11**2 - 5**2) + FC6 + FC7 + FC8),
        ({"stem_kernel": 3}, CONVOLUTIONS - 96 * 3 * (11**2 - 3**2) + FC6 + FC7 + FC8),
        ({"groups": 2}, CONVOLUTIONS - (614_400 + 1_327_104 + 884_736) // 2 + FC6 + FC7 + FC8),
        ({"norm": "bn"}, CONVOLUTIONS - NORMS // 2 + NORMS + FC6 + FC7 + FC8),
        ({"norm": "bn_after_relu"}, CONVOLUTIONS + NORMS + FC6 + FC7 + FC8),
        ({"norm": "bn", "hidden_norm": True}, CONVOLUTIONS + NORMS // 2 + FC6 + FC7 + FC8 + 2 * 512),
        (  # the network of the recipe `tiny-imagenet-best`
            {"stem_kernel": 5, "norm": "bn_after_relu", "hidden_norm": True, "pool_padding": 1},
            6_187_272,
        ),
    ],
)
def test_keys_change_shapes_as_counted_by_hand(changed: dict[str, Any], parameters: int) -> None:
    keys = {"stem_stride": 2, "groups": 1, "pool_padding": 1, "hidden_units": 512, **changed}
    with Uninitialized():
        model = make_model(ModelConfig(**keys), num_classes=200, crop_px=64)
    assert sum(p.numel() for p in model.parameters()) == parameters
    images_NCHW = torch.zeros(2, 3, 64, 64)
    map_NCHW = model.features(images_NCHW)
    assert map_NCHW.shape == (2, 256, 4, 4) and map_NCHW.is_contiguous(memory_format=torch.channels_last)
    assert model(images_NCHW).shape == (2, 200)


@pytest.mark.slow
@pytest.mark.parametrize("crop_px", [224, 256])
def test_owt_exchanges_weights_with_torchvisions_alexnet(crop_px: int) -> None:
    with Uninitialized():
        ours = make_model(ModelConfig(name="owt"), num_classes=1000, crop_px=crop_px).eval()
    theirs = torchvision.models.alexnet(num_classes=1000).eval()
    images_NCHW = torch.randn(2, 3, crop_px, crop_px, generator=torch.Generator().manual_seed(0))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(images_NCHW), theirs(images_NCHW), rtol=1e-4, atol=1e-5)
        for parameter in ours.parameters():  # other weights; twice the size, for larger logits
            parameter.copy_(2 * parameter.flip(0))
        theirs.load_state_dict(ours.state_dict(), strict=True)
        torch.testing.assert_close(ours(images_NCHW), theirs(images_NCHW), rtol=1e-4, atol=1e-4)


def test_caffe_agrees_layer_by_layer_with_bvlcs_file() -> None:
    with Uninitialized():
        model = make_model(ModelConfig(name="caffe"), num_classes=1000, crop_px=224)
    layers = [m for m in model.modules() if not isinstance(m, (nn.Sequential, AlexNet, nn.Identity))]
    nodes = [n for n in bvlc_file().graph.node if n.op_type not in ("ConstantOfShape", "Reshape", "Softmax")]
    kinds = {
        nn.Conv2d: "Conv", nn.ReLU: "Relu", LocalResponseNorm: "LRN", nn.MaxPool2d: "MaxPool",
        nn.Linear: "Gemm", Dropout: "Dropout",
    }  # fmt: skip
    assert [kinds[type(layer)] for layer in layers] == [node.op_type for node in nodes]
    compared = 0
    for layer, node in zip(layers, nodes, strict=True):
        theirs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if isinstance(layer, nn.Conv2d):
            assert layer.kernel_size == tuple(theirs["kernel_shape"])
            assert layer.stride == tuple(theirs["strides"])
            assert [*layer.padding, *layer.padding] == theirs["pads"]
            assert layer.groups == theirs.get("group", 1)
        elif isinstance(layer, nn.MaxPool2d):
            assert [layer.kernel_size] * 2 == theirs["kernel_shape"]
            assert [layer.stride] * 2 == theirs["strides"]
            # Caffe rounds up, which ONNX writes as one more row and column of padding
            assert theirs["pads"] == ([0, 0, 1, 1] if layer.ceil_mode else [0, 0, 0, 0])
        elif isinstance(layer, LocalResponseNorm):
            ours = (layer.size, layer.alpha, layer.beta, layer.k)
            assert ours == pytest.approx((theirs["size"], theirs["alpha"], theirs["beta"], theirs["bias"]))
        elif isinstance(layer, Dropout):
            assert layer.p == theirs["ratio"]
        else:
            continue
        compared += 1
    assert compared == 5 + 3 + 2 + 2


@pytest.mark.slow
def test_caffe_computes_what_bvlcs_file_computes() -> None:
    """The whole network with the same random weights, in ONNX Runtime and here."""
    file = bvlc_file()
    with Uninitialized():
        model = make_model(ModelConfig(name="caffe", dropout=0.0), num_classes=1000, crop_px=224).eval()
    weighted = [node for node in file.graph.node if node.op_type in ("Conv", "Gemm")]
    ours = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    made = {name for node in weighted for name in node.input[1:]}
    kept = [node for node in file.graph.node if not set(node.output) & made]
    del file.graph.node[:]
    file.graph.node.extend(kept)
    for node, layer in zip(weighted, ours, strict=True):
        assert layer.bias is not None
        nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        nn.init.uniform_(layer.bias, -0.1, 0.1)
        for name, value in zip(node.input[1:], (layer.weight, layer.bias), strict=True):
            array = np.ascontiguousarray(value.detach().numpy())
            file.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    session = onnxruntime.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"])
    images_NCHW = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    inputs = {i.name for i in session.get_inputs()}
    feed_name = next(name for name in kept[0].input if name in inputs)
    (theirs,) = session.run(None, {feed_name: images_NCHW.numpy()})
    with torch.no_grad():
        probabilities = model(images_NCHW).softmax(1)
    np.testing.assert_allclose(probabilities.numpy(), theirs.reshape(1, 1000), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", PARAMETERS)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = tiny(name)
    model(torch.randn(4, 3, 56, 56)).square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_initialisation_follows_its_source() -> None:
    torch.manual_seed(0)
    for init, hidden_std, one in (("paper", 0.01, 1.0), ("caffe", 0.005, 0.1)):
        model = tiny("paper", init)  # type: ignore[arg-type]
        named = dict(model.named_modules())
        ones = {"features.conv2", "features.conv4", "features.conv5", "classifier.fc6", "classifier.fc7"}
        for name, layer in named.items():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                assert layer.bias is not None
                assert layer.bias.detach().numpy() == pytest.approx(one if name in ones else 0.0), name
        assert named["features.conv3"].weight.std().item() == pytest.approx(0.01, rel=0.02)
        assert named["classifier.fc7"].weight.std().item() == pytest.approx(hidden_std, rel=0.02)
    he = dict(tiny("paper", "he").named_modules())
    fan_in = 48 * 5 * 5  # conv2 has groups of 2, so each filter sees half of the 96 channels
    assert he["features.conv2"].weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)
    default = dict(tiny("paper", "torch").named_modules())["features.conv2"]
    assert default.weight.std().item() == pytest.approx((1 / (3 * fan_in)) ** 0.5, rel=0.02)
    assert default.weight.abs().max().item() <= fan_in**-0.5 and default.bias.abs().max() > 0


@pytest.mark.slow
@pytest.mark.usefixtures("thin")  # sides do not depend on channels
@pytest.mark.parametrize("name", PARAMETERS)
def test_last_feature_map_has_the_computed_size(name: str) -> None:
    for stride, crop_px in ((1, 21), (1, 32), (1, 64), (2, 56), (2, 101), (4, 113), (4, 224), (4, 227)):
        if name == "caffe" and crop_px == 21:
            continue
        config = ModelConfig(name=name, stem_stride=stride, hidden_units=5)  # type: ignore[arg-type]
        with Uninitialized():
            model = make_model(config, num_classes=3, crop_px=crop_px).eval()
        assert model(torch.zeros(1, 3, crop_px, crop_px)).shape == (1, 3)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "bn" else name for name in PARAMETERS]
)
@pytest.mark.parametrize("stem_kernel", [3, 7, None])
def test_last_map_has_the_computed_size_with_padding(name: str, stem_kernel: int | None) -> None:
    """Rounding up, as `caffe` does, leaves out windows that begin in the padding behind the map."""
    norm = "bn" if name == "bn" else "none"
    config = ModelConfig(name=name, stem_kernel=stem_kernel, stem_stride=2, pool_padding=1, norm=norm)  # type: ignore[arg-type]
    sides = set()
    with torch.device("meta"), torch.no_grad():
        features = make_features(config)
        for crop_px in range(12, 60):
            map_NCHW = features(torch.zeros(2, 3, crop_px, crop_px))
            assert (*map_NCHW.shape[1:3],) == feature_map(features, crop_px), crop_px
            sides.add(map_NCHW.shape[2])
    assert len(sides) >= 4


def test_crop_that_is_too_small_is_refused_with_advice() -> None:
    with pytest.raises(
        UserError, match=r"crop_px 56 is too small for `paper` with stem_stride 4.*smaller stem_stride"
    ):
        make_model(ModelConfig(stem_stride=4), num_classes=10, crop_px=56)
    said = r"stem_stride 2, stem_kernel 5 and pool_padding 0.*a larger crop, pool_padding 1 or"
    with pytest.raises(UserError, match=said):
        make_model(ModelConfig(stem_stride=2, stem_kernel=5), num_classes=10, crop_px=28)
    make_model(
        ModelConfig(stem_stride=2, stem_kernel=5, pool_padding=1, hidden_units=2), num_classes=10, crop_px=28
    )


def test_normalize_is_the_contracts_arithmetic_in_place() -> None:
    preprocessing = Preprocessing()
    images_NHWC = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8)
    out = Normalize(preprocessing)(images_NHWC)
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    expected = ((images_NHWC / 255 - mean) / std).permute(0, 3, 1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("config", [
    ModelConfig(name="paper", stem_stride=2, hidden_units=24),
    ModelConfig(name="caffe", stem_stride=2, hidden_units=24),
    ModelConfig(name="owt", stem_stride=2, hidden_units=24),
    ModelConfig(name="paper", stem_stride=2, hidden_units=24, norm="bn_after_relu", hidden_norm=True),
])  # fmt: skip
def test_features_are_what_the_next_layer_reads(config: ModelConfig) -> None:
    model = make_model(config, num_classes=10, crop_px=56).eval()
    read: list[Tensor] = []
    for module in model.classifier.children():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].clone()))
    images = torch.randn(2, 3, 56, 56)
    layers: tuple[FeatureLayer, ...] = ("pool5", "fc6", "fc7")
    with torch.inference_mode():
        logits, expected = model(images), read.copy()
        for layer, expected_ND in zip(layers, expected, strict=True):
            again, features_ND = model.forward_features(images, layer)
            assert torch.equal(again, logits) and torch.equal(features_ND, expected_ND)
            assert features_ND.shape == (2, count_features(model, layer)) and features_ND.std() > 0
