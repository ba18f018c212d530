"""Pillow, the reference decoder: orientation, depth, and what a broken file's error says."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipeline.common.errors import ImageError
from data_pipeline.decode.header import read_header
from data_pipeline.decode.pillow import decode_rgb
from data_pipeline.transforms.preprocessing import Preprocessing
from tests.helpers.images import broken, encode, exif, photo

PREPROCESSING = Preprocessing(resize_px=72, crop_px=64)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decoded_image_is_upright_as_pillow_turns_it(orientation: int) -> None:
    image = photo(30, 50)
    turned = encode(image, "PNG", exif=exif(orientation))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(turned)))
    assert np.array_equal(np.asarray(decode_rgb(turned)), np.asarray(expected))
    assert read_header(turned, 10**6) == (expected.height, expected.width)


def test_sixteen_bits_are_scaled_not_saturated() -> None:
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = np.asarray(decode_rgb(encode(Image.fromarray(deep), "PNG")))[..., 0]
    assert np.array_equal(pixels, np.rint(deep / 257).astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("empty", "empty file"),
        ("text", "not an image of a known format"),
        ("png of 30000 x 30000", "30000 x 30000 pixels are above the limit of 100000000"),
    ],
)
def test_header_error_says_what_is_wrong(kind: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        read_header(broken()[kind], PREPROCESSING.max_pixels)


def test_truncated_jpeg_error_says_so() -> None:
    with pytest.raises(ImageError, match="truncated JPEG"):
        decode_rgb(broken()["jpeg, 20 bytes short"])
