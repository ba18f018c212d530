"""The form of the network that ONNX Runtime's CPU provider computes fastest, written by a second export.

ONNX's own LRN is what TensorRT, CUDA and Triton want. ONNX Runtime's CPU provider computes it on one core,
channel by channel; there the sum over neighbouring channels is faster as a product with a band of equal
weights, and the power as two square roots. docs/inference-speed.md lists what else was measured.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import torch
from onnx.external_data_helper import set_external_data
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from data_pipeline.transforms.preprocessing import Preprocessing
from train.models.alexnet import AlexNet, Normalize
from train.models.lrn import LocalResponseNorm

# Shapes: N batch, C channels, H and W rows and columns.

_WHITE = 255
_BAND = "band"
_MIN_SHARED_BYTES = 4096
"""Smaller tensors are cheaper to write again than to look for."""


class BandedLrn(nn.Module):
    """`LocalResponseNorm` whose window sum is a product with a band matrix.

    Args:
        norm: the layer that it stands for.
        channels: C of its input.
        channels_last: sum by a matrix product over the last axis, between transpositions that the runtime
            cancels where its neighbours are channels-last, too; else by a 1x1 convolution.
    Shape:
        (N, C, H, W) -> (N, C, H, W), same type; computed in float32.
    """

    band: Tensor
    bias: Tensor

    def __init__(self, norm: LocalResponseNorm, channels: int, *, channels_last: bool) -> None:
        super().__init__()
        self.beta, self.k, self.channels_last = norm.beta, norm.k, channels_last
        channel_C = torch.arange(channels)
        near_CC = (channel_C[:, None] - channel_C).abs() <= norm.size // 2
        band_CC = (near_CC * (norm.alpha / norm.size)).float()
        self.register_buffer(_BAND, band_CC if channels_last else band_CC[:, :, None, None])
        self.register_buffer("bias", torch.full((channels,), norm.k))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.channels_last:
            wide = wide.permute(0, 2, 3, 1)
            scale = (wide * wide) @ self.band + self.k
        else:
            scale = conv2d(wide * wide, self.band, self.bias)
        if self.beta == 0.75:
            root = scale.sqrt()
            power = root * root.sqrt()
        else:
            power = scale.pow(self.beta)
        out = wide / power
        return (out.permute(0, 3, 1, 2) if self.channels_last else out).to(x.dtype)


def use_banded_lrn(network: AlexNet, *, channels_last: bool = False) -> list[float]:
    """Replace the LRN layers of a network by `BandedLrn`.

    Returns:
        The exponent beta of each, in their order; empty for a network without LRN.
    """
    betas, channels = [], 0
    for name, layer in network.features.named_children():
        if isinstance(layer, nn.Conv2d):
            channels = layer.out_channels
        elif isinstance(layer, LocalResponseNorm):
            setattr(network.features, name, BandedLrn(layer, channels, channels_last=channels_last))
            betas.append(layer.beta)
    return betas


def is_lrn_sum(node: onnx.NodeProto) -> bool:
    """Whether a convolution or matrix product is the sum of a `BandedLrn`, in float32 in every precision."""
    return len(node.input) > 1 and node.input[1].endswith(f".{_BAND}")


class PixelPlanes(nn.Module):
    """Pixels as planes, and a fourth plane that is 255 throughout; see `fold_normalization`.

    Shape:
        uint8 (N, H, W, 3) -> float32 (N, 4, H, W), in 0..255.
    """

    def __init__(self, crop_px: int) -> None:
        super().__init__()
        self.crop_px = crop_px

    def forward(self, images_NHWC: Tensor) -> Tensor:
        side = self.crop_px
        # Padded as rows, since the runtime would else move the transposition behind the padding, which is
        # slow in channels-last order.
        rows = images_NHWC.permute(0, 3, 1, 2).reshape(-1, 3 * side, side)
        return pad(rows, (0, 0, 0, side), value=_WHITE).reshape(-1, 4, side, side).float()


def fold_normalization(network: AlexNet, preprocessing: Preprocessing) -> PixelPlanes:
    """Let the first convolution take pixels in place of normalised images.

    Its weights take in the scale, and those of the fourth plane the shift: so the border stays exact, where
    the convolution pads with zeros behind the normalisation.

    Returns:
        What makes the convolution's input.
    """
    normalize = Normalize(preprocessing)
    stem = next(layer for layer in network.features.children() if isinstance(layer, nn.Conv2d))
    weight = stem.weight.detach().double()
    scale, shift = (values.double()[:, None, None] for values in (normalize.scale, normalize.shift))
    constant_plane = (weight * shift).sum(1, keepdim=True) / _WHITE
    stem.weight = nn.Parameter(torch.cat([weight * scale, constant_plane], dim=1).float())
    return PixelPlanes(preprocessing.crop_px)


def share_weights(path: Path, source: Path) -> None:
    """Take the large weights out of a file that another one has, byte for byte: ONNX's external data.

    Args:
        path: an ONNX file; it is written again.
        source: the file in the same folder that they are read from afterwards.
    """
    assert source.parent == path.parent
    model, content = onnx.load(path), source.read_bytes()
    for tensor in model.graph.initializer:
        length = len(tensor.raw_data)
        if length >= _MIN_SHARED_BYTES and (offset := content.find(tensor.raw_data)) >= 0:
            set_external_data(tensor, source.name, offset=offset, length=length)
            tensor.ClearField("raw_data")
    onnx.save(model, path)
    onnx.checker.check_model(path, full_check=True)


def has_shared_weights(path: Path) -> bool:
    """Whether a file reads weights from another one."""
    model = onnx.load(path, load_external_data=False)
    return any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer)
