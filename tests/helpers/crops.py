"""Every kind of crop that training and evaluation make, and what Pillow makes of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipeline.decode.pillow import blank_images, finish_crop
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.crop import CropParams, eval_crop_params, ten_crop_params, train_crop_params
from data_pipeline.transforms.preprocessing import Preprocessing

AUGMENTS = {
    "random_resized": Augment(),
    "random_resized, colours": Augment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.3, pca=0.1),
    "windows of a few pixels": Augment(scale=(0.0005, 0.01)),
    "random": Augment(crop="random"),
    "random_square, colours": Augment(crop="random_square", pca=0.1),
    "padded": Augment(crop="padded"),
    "padded, colours": Augment(crop="padded", brightness=0.4, contrast=0.4, pca=0.1),
    "center": Augment(crop="center"),
}
KINDS = (*AUGMENTS, "eval", "ten_crop")


def crops_of(kind: str, size: tuple[int, int], count: int, preprocessing: Preprocessing) -> CropParams:
    """Crops of `count` images of one height and width; `kind` is one of KINDS."""
    sizes = [size] * count
    if kind == "eval":
        return eval_crop_params(sizes, preprocessing)
    if kind == "ten_crop":
        return ten_crop_params(sizes, preprocessing)
    return train_crop_params(sizes, 2, np.arange(count), 11, preprocessing, AUGMENTS[kind])


def crops_by_pillow(
    pixels: npt.NDArray[np.uint8], indices: npt.NDArray[np.int64], crops: CropParams
) -> npt.NDArray[np.uint8]:
    """The batch that crops of `pixels[indices]` make."""
    images = blank_images(crops)
    for i, (y, x, height, width) in enumerate(crops.windows.tolist()):
        window = np.ascontiguousarray(pixels[indices[i], y : y + height, x : x + width])
        images[i] = finish_crop(Image.fromarray(window), crops, i)
    return images
