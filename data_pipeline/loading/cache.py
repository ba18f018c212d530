"""The decoded cache: the pixels of a split whose images have one size, decoded once and kept in memory.

One process of a machine decodes into shared memory; the others map it (`pixel_store`). Batches are cropped
from there, on the CPU by the compiled resize, or on a device by code that this folder does not know: it
hands out `CachedCrops`, the parameters of a batch.

Legend: N samples of the split, H and W height and width of all its images.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.common.errors import ImageError, WorkerError
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.decode.pillow import blank_images, decode_checked
from data_pipeline.decode.resize import Resizer
from data_pipeline.loading.pixel_store import PixelStore
from data_pipeline.loading.scan import MAX_PIXELS, Chunk, scan_split
from data_pipeline.transforms.crop import CropParams
from data_pipeline.transforms.sampler import Int

Pixels = npt.NDArray[np.uint8]
_CHUNK, _CHUNK_BYTES = 256, 1 << 23
"""Images that a process decodes at once, and bytes that they take: what travels between processes."""


@dataclass(frozen=True, eq=False)
class CachedCrops:
    """Images of a batch that are still to be cropped, where the pixels are.

    Attributes:
        pixels: (N, H, W, 3) uint8 of the whole split, on a device.
        indices: (B) int64, which of them.
        crops: B crops.
    """

    pixels: Any
    indices: Int
    crops: CropParams


@dataclass(frozen=True, eq=False)
class DecodedCache:
    """The decoded pixels of a split.

    Attributes:
        dataset: the split.
        pixels: (N, H, W, 3) uint8: an array in shared memory, or whatever holds them on a device.
        size: H, W.
        valid: (N) bool, which images are decoded; the pixels of the others are zeros.
        reasons: why each of the others is not.
        store: the shared memory; None once the pixels are on a device.
    """

    dataset: Dataset
    pixels: Any
    size: tuple[int, int]
    valid: npt.NDArray[np.bool_]
    reasons: dict[int, str]
    store: PixelStore | None

    @classmethod
    def of_store(cls, dataset: Dataset, store: PixelStore) -> DecodedCache:
        """The cache in shared memory, once that is complete."""
        height, width = store.pixels.shape[1:3]
        return cls(dataset, store.pixels, (height, width), store.valid, store.reasons, store)

    def images(self, indices: Int, crops: CropParams, resizer: Resizer | None) -> object:
        """Crop a batch; images that are not valid become zeros.

        Args:
            indices: (B) which images.
            crops: B crops; changed where an image is not valid.
            resizer: crops on the CPU; None where the pixels lie on a device.
        Returns:
            As `Batch.images`, or `CachedCrops` where the pixels lie on a device.
        """
        for place in self.failures(indices):
            crops.set_blank(place)
        if self.store is None:
            return CachedCrops(self.pixels, indices, crops)
        assert resizer is not None
        images = blank_images(crops)
        resizer.crop_batch(images, self.pixels, indices, crops)
        return images

    def failures(self, indices: Int) -> dict[int, str]:
        """The reason of each place of a batch whose image is not valid."""
        bad = np.flatnonzero(~self.valid[indices]).tolist()
        return {place: self.reasons[int(indices[place])] for place in bad}

    def place(self, pixels: Any) -> DecodedCache:
        """The cache with its pixels on a device, given as a copy there; the shared memory is freed."""
        placed = replace(self, pixels=pixels, valid=self.valid.copy(), store=None)
        self.close()
        return placed

    def close(self) -> None:
        """Free the shared memory."""
        if self.store is not None:
            self.store.close()


def image_size(dataset: Dataset) -> tuple[int, int] | None:
    """Height and width of all readable images of a split; None where they differ, or nothing is known."""
    if (table := dataset.table) is None:
        return None
    sizes = table.sizes[table.kinds != 0]
    if not len(sizes) or (sizes != sizes[0]).any():
        return None
    return int(sizes[0, 0]), int(sizes[0, 1])


def bytes_needed(dataset: Dataset) -> int | None:
    """Memory that the cache of a split takes; None where its images differ in size."""
    size = image_size(dataset)
    return None if size is None else 3 * len(dataset) * size[0] * size[1]


def create_store(dataset: Dataset) -> PixelStore:
    """Make the memory for the pixels of a split whose images have one size; `fill_cache` fills it.

    Raises:
        OSError: there is not so much memory.
    """
    size = image_size(dataset)
    assert size is not None, "images of several sizes"
    return PixelStore.create(len(dataset), *size)


def fill_cache(
    dataset: Dataset, store: PixelStore, workers: int, max_pixels: int = MAX_PIXELS
) -> DecodedCache:
    """Decode every image of a split, in processes if there are many.

    Args:
        dataset: the split.
        store: from `create_store`, in the process that made it.
        workers: processes that decode, >= 1.
        max_pixels: larger images are refused by their header, as where nothing is kept.
    Raises:
        WorkerError: a worker was killed.
    """
    size = max(1, min(_CHUNK, _CHUNK_BYTES // store.pixels[0].nbytes))
    decode = partial(_decode_chunk, store.pixels.shape[1:3], max_pixels)
    places = np.arange(len(dataset), dtype=np.int64)
    try:
        with closing(scan_split(decode, dataset, places, size, workers, "decode images of")) as results:
            for part, pixels, failures in results:
                store.pixels[part], store.valid[part] = pixels, True
                store.valid[list(failures)] = False
                store.reasons |= failures
    except WorkerError as error:
        message = (
            f"a process that decodes the images of {dataset.split} was killed, for lack of memory perhaps: "
            "set data.cache to none"
        )
        store.fail(message)
        raise WorkerError(message) from error
    except BaseException as error:
        store.fail(f"the images of {dataset.split} could not be decoded into memory: {error}")
        raise
    store.complete()
    return DecodedCache.of_store(dataset, store)


def await_cache(dataset: Dataset, store: PixelStore) -> DecodedCache:
    """Wait until the process that made a store has filled it.

    Args:
        dataset: the split.
        store: from `PixelStore.attach`, in another process of the machine.
    Raises:
        WorkerError: that process ended, or failed.
    """
    store.wait_complete()
    return DecodedCache.of_store(dataset, store)


def _decode_chunk(size: tuple[int, int], max_pixels: int, chunk: Chunk) -> tuple[Int, Pixels, dict[int, str]]:
    """Decode some images: their places, (n, H, W, 3) pixels, and the reason of each that failed."""
    pixels: Pixels = np.zeros((len(chunk.places), *size, 3), np.uint8)

    def decode(i: int, data: bytes) -> None:
        image = decode_checked(data, max_pixels)
        if (image.height, image.width) != size:  # it may have changed since it was looked at
            raise ImageError(
                f"{image.width} x {image.height} pixels, where all others have {size[1]} x {size[0]}"
            )
        pixels[i] = np.asarray(image)

    return chunk.places, pixels, chunk.examine(decode, max_pixels)
