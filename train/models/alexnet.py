"""The AlexNet family, layer by layer as it was published.

`paper` is Krizhevsky 2012 as one tower with groups, `caffe` the BVLC reference, `owt` the "one weird trick"
network of Krizhevsky 2014 (torchvision's `alexnet`, key for key), and `bn` has batch normalisation in place
of LRN. All take a number of classes, a crop size and a stem stride, so that 64-pixel data need not be blown
up to 224.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from data_pipeline.transforms.preprocessing import Preprocessing
from train.config.schema import ModelConfig
from train.models.init import initialize
from train.models.lrn import LocalResponseNorm

# Shapes: N batch, C channels or classes, H and W rows and columns.


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


def _paper_features(stem_stride: int, stem_padding: int, k: float, last_pool_ceil: bool) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 96, kernel_size=11, stride=stem_stride, padding=stem_padding),
            relu1=nn.ReLU(inplace=True),
            norm1=LocalResponseNorm(k=k),
            pool1=nn.MaxPool2d(kernel_size=3, stride=2),
            conv2=nn.Conv2d(96, 256, kernel_size=5, padding=2, groups=2),
            relu2=nn.ReLU(inplace=True),
            norm2=LocalResponseNorm(k=k),
            pool2=nn.MaxPool2d(kernel_size=3, stride=2),
            conv3=nn.Conv2d(256, 384, kernel_size=3, padding=1),
            relu3=nn.ReLU(inplace=True),
            conv4=nn.Conv2d(384, 384, kernel_size=3, padding=1, groups=2),
            relu4=nn.ReLU(inplace=True),
            conv5=nn.Conv2d(384, 256, kernel_size=3, padding=1, groups=2),
            relu5=nn.ReLU(inplace=True),
            pool5=nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=last_pool_ceil),
        )
    )


def _paper_classifier(num_features: int, width: int, num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            fc6=nn.Linear(num_features, width),
            relu6=nn.ReLU(inplace=True),
            drop6=nn.Dropout(dropout),
            fc7=nn.Linear(width, width),
            relu7=nn.ReLU(inplace=True),
            drop7=nn.Dropout(dropout),
            fc8=nn.Linear(width, num_classes),
        )
    )


def _bn_features(stem_stride: int) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    in_channels = 3
    for number, channels, kernel, stride, padding, groups in (
        (1, 96, 11, stem_stride, 2, 1),
        (2, 256, 5, 1, 2, 2),
        (3, 384, 3, 1, 1, 1),
        (4, 384, 3, 1, 1, 2),
        (5, 256, 3, 1, 1, 2),
    ):
        # no bias: the norm that follows has its own
        layers[f"conv{number}"] = nn.Conv2d(
            in_channels, channels, kernel, stride, padding, groups=groups, bias=False
        )
        layers[f"norm{number}"] = nn.BatchNorm2d(channels)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        if number in (1, 2, 5):
            layers[f"pool{number}"] = nn.MaxPool2d(kernel_size=3, stride=2)
        in_channels = channels
    return nn.Sequential(layers)


def _owt_features(stem_stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, kernel_size=11, stride=stem_stride, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(64, 192, kernel_size=5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        nn.Conv2d(192, 384, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
    )


def _owt_classifier(num_features: int, width: int, num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(num_features, width),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(width, width),
        nn.ReLU(inplace=True),
        nn.Linear(width, num_classes),
    )


FEATURES: dict[str, Callable[[int], nn.Sequential]] = {
    "paper": lambda stride: _paper_features(stride, stem_padding=2, k=2.0, last_pool_ceil=False),
    "caffe": lambda stride: _paper_features(stride, stem_padding=0, k=1.0, last_pool_ceil=True),
    "owt": _owt_features,
    "bn": _bn_features,
}


def _feature_map(features: nn.Sequential, crop_px: int) -> tuple[int, int]:
    """Compute channels and side of the last feature map from the layers' sizes; side 0 if none is left."""
    channels, side = 3, crop_px
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            channels = layer.out_channels
            side = (side + 2 * int(layer.padding[0]) - layer.kernel_size[0]) // layer.stride[0] + 1
        elif isinstance(layer, nn.MaxPool2d):
            assert isinstance(layer.kernel_size, int) and isinstance(layer.stride, int) and not layer.padding
            beyond = side - layer.kernel_size  # pixels beyond the first window
            side = (-(-beyond // layer.stride) if layer.ceil_mode else beyond // layer.stride) + 1
        if side < 1:
            return channels, 0
    return channels, side


def _last_map(config: ModelConfig, crop_px: int) -> tuple[int, int]:
    """Return channels and side of the feature map that the fully connected layers read.

    Raises:
        UserError: crop_px is so small that no feature map is left after the last pooling.
    """
    channels, side = _feature_map(FEATURES[config.name](config.stem_stride), crop_px)
    if side < 1:
        raise UserError(
            f"crop_px {crop_px} is too small for `{config.name}` with stem_stride {config.stem_stride}: "
            "no pixel is left after the last pooling; use a larger crop or a smaller stem_stride"
        )
    # torchvision averages every map to 6x6; here smaller maps keep their size.
    return channels, min(side, 6) if config.name == "owt" else side


def count_hidden_weights(config: ModelConfig, *, num_classes: int, crop_px: int) -> int:
    """Count the weights of a network's fully connected layers, without biases and without building them.

    >>> count_hidden_weights(ModelConfig(name="owt"), num_classes=1000, crop_px=224)
    58621952
    """
    channels, side = _last_map(config, crop_px)
    return config.hidden_units * (channels * side * side + config.hidden_units + num_classes)


def make_model(config: ModelConfig, *, num_classes: int, crop_px: int) -> AlexNet:
    """Build and initialise a network, in float32 and channels_last, with torch's default generator.

    Args:
        config: which network, its stem stride, hidden units, dropout and initialisation.
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
    pool = nn.AdaptiveAvgPool2d((side, side)) if config.name == "owt" else nn.Identity()
    make_classifier = _owt_classifier if config.name == "owt" else _paper_classifier
    classifier = make_classifier(channels * side * side, config.hidden_units, num_classes, config.dropout)
    model = AlexNet(FEATURES[config.name](config.stem_stride), pool, classifier)
    initialize(model, config.init)
    return model.to(memory_format=torch.channels_last)
