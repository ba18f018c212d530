"""Makes feeds, batches of files that a decoder takes at once, from the sample table.

An image of which the table knows that the decoder reads it is handed over as a view of its shard, or as a
path. Every other one is read here, in Python: cut and resized by Pillow where the decoder does not read it,
or where too many large images would be decoded whole at the same time.

Legend: N images of a batch. A place is a number in 0..N - 1, an index one of the dataset's.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipeline.common.errors import ImageError
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.decode.feed import (
    MAX_MEMORY_PATH,
    Bytes,
    Feed,
    FilePaths,
    MemoryFile,
    black_pixel,
    cut_as_bmp,
)
from data_pipeline.decode.look import is_for_pillow
from data_pipeline.loading.readers import EncodedImage, Reader, Samples
from data_pipeline.transforms.crop import CropParams
from data_pipeline.transforms.sampler import Int

log = logging.getLogger("data_pipeline")

_NOTHING = np.empty(0, np.uint8)
CropFn = Callable[[Int], CropParams]
"""The crops for the upright sizes, (N, 2), of a batch's N images."""


class Made(NamedTuple):
    """A feed, and what is not as usual in it.

    Attributes:
        failures: the reason of each place at which a black pixel stands for an image that failed.
        by_pillow: whether Pillow decoded some of the images, which the decoder cannot read.
    """

    feed: Feed
    failures: dict[int, str]
    by_pillow: bool = False


class FeedMaker:
    """Makes the feeds of one stream of batches; any thread may call it.

    Args:
        reader: reads what is not known.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._num_cut, self._lock = 0, threading.Lock()

    def make(self, samples: Samples, indices: Int, crop_fn: CropFn, max_batch_bytes: int | None) -> Made:
        """Make the feed of a batch.

        Args:
            samples: where the images are.
            indices: (N) which of them.
            crop_fn: the crops for their sizes.
            max_batch_bytes: bound on what the decoder decodes; None for no bound.
        """
        files, sizes, direct = _known(samples, indices, self._reader.max_pixels)
        unknown = np.flatnonzero(~direct)
        read = self._read(samples, indices, unknown, sizes)
        crops = crop_fn(sizes)
        cut = {p for p in read if samples.table is not None or is_for_pillow(read[p].data or b"")}
        large = self.too_large(sizes, cut, max_batch_bytes)
        if more := self._read(samples, indices, [place for place in large if place not in read], sizes):
            read |= more
            crops = crop_fn(sizes)
        made = self._replace(files, sizes, crops, read, cut | set(large))
        return made._replace(by_pillow=not cut <= set(made.failures))

    def too_large(self, sizes: Int, cut: Iterable[int], max_batch_bytes: int | None) -> list[int]:
        """Places of the largest images, without which the others decode to at most so many bytes; counted.

        Args:
            sizes: (N, 2) upright sizes.
            cut: places that are not decoded whole anyway.
            max_batch_bytes: the bound; None for none.
        """
        if max_batch_bytes is None:
            return []
        needed = 3 * sizes.prod(axis=1)
        needed[list(cut)] = 0
        if (excess := int(needed.sum()) - max_batch_bytes) <= 0:
            return []
        order = np.argsort(-needed, kind="stable")
        count = int(np.searchsorted(np.cumsum(needed[order]), excess)) + 1
        with self._lock:
            if not self._num_cut:
                log.info(
                    "the images of a batch decode to more than %.2g GB: the largest are cut on the CPU, more "
                    "slowly (data.max_decoded_gb)", max_batch_bytes / 1e9,
                )  # fmt: skip
            self._num_cut += count
        return [int(place) for place in order[:count]]

    def close(self) -> None:
        """Log how many images were cut on the CPU for lack of room, if any."""
        if self._num_cut:
            log.info("%d large images were cut on the CPU", self._num_cut)

    def cut(self, image: EncodedImage, crops: CropParams, place: int) -> EncodedImage:
        """An image with its window cut and resized, as a file; or with the reason why that failed."""
        if image.data is None:
            return image
        try:
            return EncodedImage(cut_as_bmp(image.data, crops, place), image.height_width)
        except ImageError as error:
            return EncodedImage(None, reason=str(error))

    def _read(
        self, samples: Samples, indices: Int, places: Iterable[int], sizes: Int
    ) -> dict[int, EncodedImage]:
        """Read the images at some places, and note their sizes, which may be others than the table's."""
        wanted = [int(place) for place in places]
        if not wanted:
            return {}
        read = dict(zip(wanted, self._reader.fetch(samples, indices[wanted].tolist()), strict=True))
        sizes[wanted] = [image.height_width for image in read.values()]
        return read

    def _replace(
        self,
        files: list[Bytes] | FilePaths,
        sizes: Int,
        crops: CropParams,
        read: dict[int, EncodedImage],
        cut: set[int],
    ) -> Made:
        """Put the images that were read into their places, cut where they must be."""
        cuts = {p: self._reader.pool.submit(self.cut, read[p], crops, p) for p in sorted(cut)}
        failures, temporary = {}, []
        for place, image in read.items():
            made = cuts[place].result() if place in cuts else image
            data = made.data
            if data is None:
                failures[place] = made.reason
                data = black_pixel()
                crops.set_blank(place)
                sizes[place] = 1
            elif place in cuts:
                crops.set_cut(place)
                sizes[place] = crops.sizes[place]
            if isinstance(files, FilePaths):
                temporary.append(MemoryFile(data))
                files.replace(place, temporary[-1].path, len(data))
            else:
                files[place] = np.frombuffer(data, np.uint8)
        return Made(Feed(files, sizes, crops, tuple(temporary)), failures)


def _known(
    samples: Samples, indices: Int, max_pixels: int
) -> tuple[list[Bytes] | FilePaths, Int, npt.NDArray[np.bool_]]:
    """The table's columns for a batch: files, their sizes, and which of both may be used as they are."""
    count = len(indices)
    table = samples.table
    if table is None or not isinstance(samples, Dataset):
        return [_NOTHING] * count, np.ones((count, 2), np.int64), np.zeros(count, np.bool_)
    sizes = table.sizes[indices].astype(np.int64)
    direct = table.direct[indices] & (sizes.prod(axis=1) <= max_pixels)
    if samples.reader is not None:
        samples.reader.read_ahead(indices)
        views, sound = samples.reader.views(indices)
        return views, sizes, direct & sound
    prefix = os.fsencode(f"{samples.root}/{samples.folder}/")
    paths = PackedStrings.pack(samples.paths).padded(indices, prefix, MAX_MEMORY_PATH)
    return FilePaths(paths, table.lengths[indices].astype(np.int64)), sizes, direct
