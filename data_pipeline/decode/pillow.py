"""The reference decoder, with Pillow and NumPy: the oracle for DALI, and the fallback where DALI is absent.

The policy for every kind of file is here, once, for training and prediction:

| file | becomes |
|---|---|
| EXIF orientation 1..8 | turned upright; sizes and windows are those of the upright image |
| grayscale, palette, 1-bit | RGB |
| transparency | dropped: the colours as stored, over nothing |
| 16 bits a channel | scaled to 8 |
| CMYK | RGB, without a colour profile; inverted first where Adobe's marker says that it is stored so |
| animation, several pages | the first frame |
| icon of several pictures | the largest, of equal ones the deepest |
| truncated, or otherwise not wholly readable | `ImageError` |
| more pixels than `max_pixels`, by the header | `ImageError`, before anything is decoded |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops

from data_pipeline.common.errors import ImageError
from data_pipeline.common.image_kind import kind_of
from data_pipeline.decode.header import TURNS, open_image, orientation_of, read_header, reader_errors
from data_pipeline.transforms.crop import CropParams

_DIRECT_CROP_PIXELS = 1 << 26


@dataclass(frozen=True)
class Decoded:
    """A decoded batch.

    Attributes:
        images: (N, crop, crop, 3) uint8 RGB, or (N, V, crop, crop, 3) for V views of each image; any object
            with `__dlpack__`; zeros where a file failed.
        failures: the reason for each sample that failed, by its place in the batch.
        transcoded: places of the samples that Pillow decoded, since the backend itself cannot.
    """

    images: object
    failures: dict[int, str] = field(default_factory=dict)
    transcoded: frozenset[int] = frozenset()


class PillowBackend:
    """Decodes batches with Pillow, a thread for each file.

    Args:
        num_threads: files decoded at once (Pillow releases the interpreter while it decodes).
        max_batch: most samples in one call.
    """

    name = "pillow"
    device = "cpu"
    takes_feeds = False

    def __init__(self, num_threads: int, max_batch: int) -> None:
        self.max_batch = max_batch
        self._num_threads = max(1, num_threads)
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="pillow")

    def decode(self, encoded: Sequence[bytes | None], crops: CropParams) -> Decoded:
        """Decode a batch; a file that fails leaves zeros and its reason.

        Args:
            encoded: N files' bytes; None leaves zeros.
            crops: N crops.
        Returns:
            A NumPy array that the caller owns, and the failures.
        """
        images, failures = blank_images(crops), {}

        def work(i: int) -> None:
            try:
                if (data := encoded[i]) is not None:
                    images[i] = decode_one(data, crops, i)
            except ImageError as error:
                failures[i] = str(error)

        parallel_for(work, len(encoded), self._pool, self._num_threads)
        return Decoded(images, dict(sorted(failures.items())))

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown()


def decode_rgb(encoded: bytes) -> Image.Image:
    """Decode the whole image: 8-bit RGB, upright, by the policy above.

    Raises:
        ImageError: not an image, or not wholly readable.
    """
    image = open_image(encoded)
    turn = TURNS.get(orientation_of(image))
    with reader_errors(kind_of(encoded)):
        image.load()
        rgb = _to_rgb(image)
    return rgb.transpose(turn) if turn is not None else rgb


def decode_checked(encoded: bytes, max_pixels: int) -> Image.Image:
    """Decode the whole image, as `decode_rgb`, if its header allows it and tells the truth.

    Raises:
        ImageError: why training cannot use the image.
    """
    height, width = read_header(encoded, max_pixels)
    image = decode_rgb(encoded)
    if (image.height, image.width) != (height, width):
        raise _disagrees(image)
    return image


def decode_one(encoded: bytes, crops: CropParams, index: int) -> npt.NDArray[np.uint8]:
    """Decode one image and crop it.

    Args:
        encoded: the file's bytes.
        crops: of a batch.
        index: which of the crops.
    Returns:
        (crop, crop, 3) uint8, or (V, crop, crop, 3).
    Raises:
        ImageError: as `decode_window`.
    """
    return finish_crop(decode_window(encoded, crops, index), crops, index)


def decode_window(encoded: bytes, crops: CropParams, index: int) -> Image.Image:
    """Decode one image and cut its window.

    Args: as `decode_one`.
    Raises:
        ImageError: as `decode_rgb`, or a size that differs from the header's.
    """
    image = decode_rgb(encoded)
    y, x, h, w = (int(value) for value in crops.windows[index])
    if y + h > image.height or x + w > image.width:
        raise _disagrees(image)
    # cut first, then resize: pixels outside the window must not bleed in, as `resize(box=...)` would let them
    if (h, w) == (image.height, image.width):
        return image
    if h * w < _DIRECT_CROP_PIXELS:
        return image.crop((x, y, x + w, y + h))
    # `crop` applies Pillow's own pixel limit, which is a global of the process
    return Image.fromarray(np.asarray(image)[y : y + h, x : x + w])


def _disagrees(image: Image.Image) -> ImageError:
    return ImageError(f"its header and its pixels disagree about the size ({image.width} x {image.height})")


def resize_window(window: Image.Image, crops: CropParams, index: int) -> Image.Image:
    """Resize a decoded window to `crops.sizes`."""
    height, width = (int(value) for value in crops.sizes[index])
    return window.resize((width, height), Image.Resampling.BILINEAR)


def finish_crop(window: Image.Image, crops: CropParams, index: int) -> npt.NDArray[np.uint8]:
    """Resize, crop, colour and mirror a decoded window.

    Args:
        window: RGB.
        crops: of a batch.
        index: which of the crops.
    Returns:
        (crop, crop, 3) uint8, or (V, crop, crop, 3).
    """
    resized = resize_window(window, crops, index)
    matrix = None if crops.colors is None else tuple(crops.colors[index].ravel().tolist())
    side, views = crops.crop_px, []
    offsets, flips = crops.offsets[index].reshape(-1, 2), crops.flips[index].reshape(-1)
    for (top, left), flip in zip(offsets.tolist(), flips.tolist(), strict=True):
        view, box = resized, (left, top, left + side, top + side)
        if box != (0, 0, *resized.size):
            view = resized.crop(box)  # black where the box is outside
        if matrix is not None:
            view = view.convert("RGB", matrix)
        # by Pillow: NumPy takes five times as long to copy rows of pixels from right to left
        views.append(np.asarray(view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view))
    return np.stack(views) if crops.views else views[0]


def parallel_for(work: Callable[[int], None], count: int, pool: ThreadPoolExecutor, num_threads: int) -> None:
    """Call `work` with 0..count - 1; a thread takes every `num_threads`-th, since a task costs time too."""

    def share(first: int) -> None:
        for number in range(first, count, num_threads):
            work(number)

    list(pool.map(share, range(num_threads)))


def blank_images(crops: CropParams) -> npt.NDArray[np.uint8]:
    """Make zeros in the shape of a batch's images."""
    side = crops.crop_px
    return np.zeros((len(crops), *crops.views, side, side, 3), dtype=np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("32 bits a pixel are not supported")
        # Pillow's own conversion saturates: all above 255 would be white
        image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ImageError("floating-point pixels are not supported")
    if image.format == "JPEG" and image.mode == "CMYK" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes every CMYK JPEG for one of Adobe's
    image.info.pop("transparency", None)  # else a palette with transparency converts with a warning
    return image.convert("RGB")
