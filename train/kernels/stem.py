"""The first convolution as one of stride 1 on blocks of pixels (space-to-depth), and what feeds it.

Tensor cores multiply by eights of channels, and images have three. A convolution of stride s reads the image
in steps of s pixels, so each block of s x s pixels can be one pixel of more channels: an 11 x 11 kernel of
stride 4 on 3 channels is a 3 x 3 kernel of stride 1 on 48. It is the same sum in another order. Weights stay
what they are in the network and its checkpoints; `s2d_weights` regroups them in each pass, differentiably.
Images are regrouped by `train.kernels.stem_triton`; torch's `conv2d` of both is the convolution's output.

A block's channels are its pixels, row by row, each with its three colours: channel (a * s + b) * 3 + c is
colour c of the pixel in row a and column b of the block. So a row of a block is a run of bytes both in the
image and in the block. Channels of zeros follow up to a multiple of 8, which libraries would otherwise add
in a pass of their own: 12 become 16 and 27 become 32 (strides 2 and 3), 48 stay.

Legend: N samples; H and W rows and columns of the images; B blocks along a side; O channels of the
convolution's output; I = 3, the colours; D channels of a block; K a side of the kernel, in blocks where it is
regrouped; a and b a row and a column inside of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import pad

COLORS = 3
EIGHT = 8
"""Channels come in multiples of it."""


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a regrouped convolution.

    Attributes:
        crop_px: side of the images.
        stride: of the convolution, and the side of a block in pixels.
        padding: zeros in front of the first row and column.
        kernel_blocks: K, side of the regrouped kernel.
        out_px: side of the convolution's output.
    """

    crop_px: int
    stride: int
    padding: int
    kernel_blocks: int
    out_px: int

    @property
    def blocks(self) -> int:
        """B: as many as the windows reach; pixels behind them are read by no window."""
        return self.out_px - 1 + self.kernel_blocks

    @property
    def channels(self) -> int:
        """D, with the channels of zeros."""
        return block_channels(self.stride)


def block_channels(stride: int) -> int:
    """Count the channels of a block of pixels, with those of zeros.

    >>> [block_channels(stride) for stride in (2, 3, 4)]
    [16, 32, 48]
    """
    return -(-stride * stride * COLORS // EIGHT) * EIGHT


def s2d_shape(crop_px: int, kernel: int, stride: int, padding: int) -> BlockShape:
    """Compute the sizes of a regrouped convolution.

    Args:
        crop_px, kernel, padding: in pixels; the padded image holds the kernel at least once.
        stride: at least 2.

    >>> shape = s2d_shape(224, 11, 4, 2)
    >>> shape.out_px, shape.blocks, shape.channels, shape.kernel_blocks
    (55, 57, 48, 3)
    """
    assert stride >= 2 and crop_px + 2 * padding >= kernel
    out_px = (crop_px + 2 * padding - kernel) // stride + 1
    return BlockShape(crop_px, stride, padding, kernel_blocks=-(-kernel // stride), out_px=out_px)


def why_plain(conv: nn.Conv2d) -> str | None:
    """Say why a convolution is not regrouped, for the log; None where it is."""
    if conv.stride[0] == 1:
        return "the first convolution has a stride of 1, and blocks of one pixel are the pixels"
    if conv.in_channels != COLORS:
        return f"the first convolution reads {conv.in_channels} channels, not the {COLORS} of an image"
    sides = (conv.stride, conv.kernel_size, conv.padding)
    uneven = any(isinstance(side, str) or side[0] != side[1] for side in sides)
    if uneven or conv.groups != 1 or conv.dilation != (1, 1) or conv.padding_mode != "zeros":
        return "the first convolution is not square, or has groups, dilation or another padding than zeros"
    return None


def s2d_weights(weights_OIKK: Tensor, stride: int) -> Tensor:
    """Regroup a convolution's weights for blocks of pixels; differentiable.

    Args:
        weights_OIKK: (O, 3, kernel, kernel), any float type.
        stride: of the convolution, at least 2.
    Returns:
        (O, D, K, K) of the same type, channels_last.
    """
    out_channels, colors, kernel, _ = weights_OIKK.shape
    assert colors == COLORS
    blocks = -(-kernel // stride)
    behind = blocks * stride - kernel
    # `pad` copies even where nothing is added: a launch, forward and backward
    padded = pad(weights_OIKK, (0, behind, 0, behind)) if behind else weights_OIKK
    split_OIKaKb = padded.reshape(out_channels, colors, blocks, stride, blocks, stride)
    weights_OKKD = split_OIKaKb.permute(0, 2, 4, 3, 5, 1).reshape(out_channels, blocks, blocks, -1)
    zeros = block_channels(stride) - weights_OKKD.shape[-1]
    return (pad(weights_OKKD, (0, zeros)) if zeros else weights_OKKD).permute(0, 3, 1, 2)
