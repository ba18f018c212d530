"""The AlexNet family, layer by layer as it was published.

`paper` is Krizhevsky 2012 as one tower with groups, `caffe` the BVLC reference, `owt` the "one weird trick"
network of Krizhevsky 2014 (torchvision's `alexnet`, key for key), and `bn` has batch normalisation in place
of LRN. `NETWORKS` is the table of what was published; a configuration can change the stem, the groups, the
norms, the pooling and the hidden layers, so that 64-pixel data need not be blown up to 224.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from data_pipeline.transforms.preprocessing import Preprocessing
from train.config.schema import Groups, ModelConfig, Norm
from train.models.average_pool import AveragePool
from train.models.batch_norm import BatchNorm
from train.models.dropout import Dropout, Masks
from train.models.init import Uninitialized, initialize
from train.models.lrn import LocalResponseNorm

# Shapes: N batch, C channels or classes, H and W rows and columns, D features.

FeatureLayer = Literal["fc7", "fc6", "pool5"]


class AlexNet(nn.Module):
    """Convolutional features, then three fully connected layers.

    Shape:
        normalised float images (N, 3, crop_px, crop_px) -> logits (N, num_classes).
    """

    def __init__(self, features: nn.Sequential, pool: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.avgpool = pool
        self.classifier = classifier

    def forward(self, images_NCHW: Tensor) -> Tensor:
        features_NCHW = self.avgpool(self.features(images_NCHW))
        logits_NC: Tensor = self.classifier(torch.flatten(features_NCHW, 1))
        return logits_NC

    def forward_features(self, images_NCHW: Tensor, layer: FeatureLayer) -> tuple[Tensor, Tensor]:
        """Return the logits, and what a layer gives: behind its ReLU and norm, in front of dropout.

        Shape:
            normalised float images (N, 3, crop_px, crop_px) -> (N, num_classes), (N, D).
        """
        hidden_ND = torch.flatten(self.avgpool(self.features(images_NCHW)), 1)
        end, features_ND = count_layers(self, layer), hidden_ND
        for number, module in enumerate(self.classifier.children(), 1):
            hidden_ND = module(hidden_ND)
            if number == end:
                features_ND = hidden_ND
        return hidden_ND, features_ND


def count_layers(model: AlexNet, layer: FeatureLayer) -> int:
    """Count the modules of the classifier up to the end of `fc6` or `fc7`; 0 for `pool5`, which it reads.

    A layer ends in front of the dropout or the matrix product that follows it: `owt` has dropout in front of
    its layers, the others behind them, and its modules have numbers for names.
    """
    wanted = {"pool5": 0, "fc6": 1, "fc7": 2}[layer]
    num_products = 0
    for number, module in enumerate(model.classifier.children()):
        if num_products == wanted and isinstance(module, (Dropout, nn.Linear)):
            return number
        num_products += isinstance(module, nn.Linear)
    raise AssertionError("the last layer is the classes'")


def count_features(model: AlexNet, layer: FeatureLayer) -> int:
    """Count the features that a layer gives for an image: what the next matrix product takes."""
    rest = list(model.classifier.children())[count_layers(model, layer) :]
    return next(module.in_features for module in rest if isinstance(module, nn.Linear))


class Normalize(nn.Module):
    """Normalises decoded uint8 RGB for the network: `(pixel / 255 - mean) / std`.

    The same module runs in training, in evaluation and inside the exported graph.

    Shape:
        uint8 (N, H, W, 3) -> float32 (N, 3, H, W), a channels_last view: no pixel is moved.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        # One multiplication and one addition a pixel; computed in float64, applied in float32.
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)

    def forward(self, images_NHWC: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            # The same numbers in another form: ONNX Runtime's CPU kernels are fast on planes, not on triples.
            images_NCHW = images_NHWC.float().permute(0, 3, 1, 2)
            return images_NCHW * self.scale[:, None, None] + self.shift[:, None, None]
        return (images_NHWC.float() * self.scale + self.shift).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Network:
    """One network as it was published; the keys of `ModelConfig` that are not None take the place of its own.

    Attributes:
        channels: of each of the five convolutions.
        groups: of the 2nd, 4th and 5th convolution.
        norm: what normalises, see `ModelConfig`.
        lrn_k: the constant k of local response normalisation.
        stem_padding: of the first convolution where its kernel is the published one, of 11 x 11.
        last_pool_ceil: whether the last pooling rounds the size of its map up.
        numbered: whether layers have torchvision's numbers for names, and dropout stands before the layers.
    """

    channels: tuple[int, int, int, int, int]
    groups: Groups
    norm: Norm
    lrn_k: float = 2.0
    stem_padding: int = 2
    last_pool_ceil: bool = False
    numbered: bool = False


KERNELS = (11, 5, 3, 3, 3)
GROUPED = (2, 4, 5)
"""Convolutions that were split over the two GPUs of 2012."""
POOLED = (1, 2, 5)
"""Convolutions that a pooling follows: 3 x 3, every second pixel."""
LRN_AT = (1, 2)
"""Convolutions that local response normalisation follows; batch normalisation follows all five."""

WIDE = (96, 256, 384, 384, 256)
"""Channels of the networks that follow the paper of 2012."""

NETWORKS = {
    "paper": Network(channels=WIDE, groups=2, norm="lrn"),
    "caffe": Network(channels=WIDE, groups=2, norm="lrn", lrn_k=1.0, stem_padding=0, last_pool_ceil=True),
    "owt": Network(channels=(64, 192, 384, 256, 256), groups=1, norm="none", numbered=True),
    "bn": Network(channels=WIDE, groups=2, norm="bn"),
}


def make_features(config: ModelConfig) -> nn.Sequential:
    """Build the convolutions, each with its norm, ReLU and pooling: (N, 3, H, W) -> (N, C, H', W')."""
    network = NETWORKS[config.name]
    norm = config.norm or network.norm
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    in_channels = 3
    for number, (channels, published) in enumerate(zip(network.channels, KERNELS, strict=True), 1):
        kernel = (config.stem_kernel or published) if number == 1 else published
        layers[f"conv{number}"] = nn.Conv2d(
            in_channels,
            channels,
            kernel,
            stride=config.stem_stride if number == 1 else 1,
            padding=network.stem_padding if kernel == 11 else kernel // 2,
            groups=(config.groups or network.groups) if number in GROUPED else 1,
            bias=norm != "bn",  # the norm that follows has its own
        )
        if norm == "bn":
            layers[f"norm{number}"] = BatchNorm(channels, config.norm_batch)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        if norm == "bn_after_relu":
            layers[f"norm{number}"] = BatchNorm(channels, config.norm_batch)
        elif norm == "lrn" and number in LRN_AT:
            layers[f"norm{number}"] = LocalResponseNorm(k=network.lrn_k)
        if number in POOLED:
            ceil = network.last_pool_ceil and number == POOLED[-1]
            layers[f"pool{number}"] = nn.MaxPool2d(3, 2, padding=config.pool_padding, ceil_mode=ceil)
        in_channels = channels
    return _named(layers, network)


def make_classifier(config: ModelConfig, num_features: int, num_classes: int) -> nn.Sequential:
    """Build the three fully connected layers, two of them hidden: (N, num_features) -> (N, num_classes)."""
    network = NETWORKS[config.name]
    norm = (config.norm or network.norm) if config.hidden_norm else "none"
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    in_features, width = num_features, config.hidden_units
    masks = Masks(num_layers=2)
    for number in (6, 7):
        dropout = Dropout(config.dropout, number - 6, masks)
        if network.numbered:
            layers[f"drop{number}"] = dropout
        layers[f"fc{number}"] = nn.Linear(in_features, width, bias=norm != "bn")
        if norm == "bn":
            layers[f"norm{number}"] = BatchNorm(width, config.norm_batch)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        if norm == "bn_after_relu":
            layers[f"norm{number}"] = BatchNorm(width, config.norm_batch)
        if not network.numbered:
            layers[f"drop{number}"] = dropout
        in_features = width
    layers["fc8"] = nn.Linear(in_features, num_classes)
    return _named(layers, network)


def _named(layers: OrderedDict[str, nn.Module], network: Network) -> nn.Sequential:
    return nn.Sequential(*layers.values()) if network.numbered else nn.Sequential(layers)


def feature_map(features: nn.Sequential, crop_px: int) -> tuple[int, int]:
    """Compute channels and side of the last feature map from the layers' sizes; side 0 if none is left."""
    channels, side = 3, crop_px
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            channels = layer.out_channels
            side = (side + 2 * int(layer.padding[0]) - layer.kernel_size[0]) // layer.stride[0] + 1
        elif isinstance(layer, nn.MaxPool2d):
            assert isinstance(layer.kernel_size, int) and isinstance(layer.stride, int)
            assert isinstance(layer.padding, int)
            beyond = side + 2 * layer.padding - layer.kernel_size  # pixels beyond the first window
            steps = -(-beyond // layer.stride) if layer.ceil_mode else beyond // layer.stride
            # a window that would begin behind the last pixel is left out
            side = steps + 1 - (layer.ceil_mode and steps * layer.stride >= side + layer.padding)
        if side < 1:
            return channels, 0
    return channels, side


def _last_map(config: ModelConfig, crop_px: int) -> tuple[int, int]:
    """Return channels and side of the feature map that the fully connected layers read.

    Raises:
        UserError: crop_px is so small that no feature map is left after the last pooling.
    """
    channels, side = feature_map(make_features(config), crop_px)
    if side < 1:
        kernel, padding = config.stem_kernel or KERNELS[0], config.pool_padding
        raise UserError(
            f"crop_px {crop_px} is too small for `{config.name}` with stem_stride {config.stem_stride}, "
            f"stem_kernel {kernel} and pool_padding {padding}: no pixel is left after the last pooling; use "
            f"a larger crop{'' if padding else ', pool_padding 1'} or a smaller stem_stride"
        )
    # torchvision averages every map to 6x6; here smaller maps keep their size.
    return channels, min(side, 6) if config.name == "owt" else side


def count_hidden_weights(config: ModelConfig, *, num_classes: int, crop_px: int) -> int:
    """Count the weights of a network's fully connected layers, without biases and without building them.

    >>> count_hidden_weights(ModelConfig(name="owt"), num_classes=1000, crop_px=224)
    58621952
    """
    with Uninitialized():  # of the convolutions, whose sizes are all that counts
        channels, side = _last_map(config, crop_px)
    return config.hidden_units * (channels * side * side + config.hidden_units + num_classes)


def make_model(config: ModelConfig, *, num_classes: int, crop_px: int) -> AlexNet:
    """Build and initialise a network, in float32 and channels_last, with torch's default generator.

    Args:
        config: which network, and what differs from it as it was published.
        num_classes: number of logits, at least 2.
        crop_px: side of its input images, in pixels.
    Returns:
        A model in training mode; (N, 3, crop_px, crop_px) -> (N, num_classes).
    Raises:
        UserError: images so small that no feature map is left after the last pooling, or a single class.
    Source: Krizhevsky et al. 2012, section 3.5; Krizhevsky 2014; BVLC `bvlc_alexnet/train_val.prototxt`.
    """
    if num_classes < 2:
        raise UserError(f"a classifier needs at least 2 classes, not {num_classes}")
    channels, side = _last_map(config, crop_px)
    pool = AveragePool((side, side)) if config.name == "owt" else nn.Identity()
    classifier = make_classifier(config, channels * side * side, num_classes)
    model = AlexNet(make_features(config), pool, classifier)
    initialize(model, config.init)
    return model.to(memory_format=torch.channels_last)
