"""Splits a dataset into chunks for worker processes, in the order in which the images lie on the disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from data_pipeline.common.errors import ImageError
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loading.readers import MAX_BYTES_PER_PIXEL
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.sampler import Int

CHUNK = 64
"""Images that a worker takes at once."""

MAX_PIXELS = Preprocessing().max_pixels
"""Larger images are refused by their header, as in training."""


@dataclass(frozen=True)
class Chunk:
    """Some samples of a split.

    Attributes:
        places: (N) which samples of the split.
        samples: the same, as a dataset of their own.
    """

    places: Int
    samples: Dataset

    def examine(self, look: Callable[[bytes], object]) -> dict[int, str]:
        """Call a function with each encoded image; either may fail with an `ImageError`.

        Returns:
            The reason of each failure, by the sample's place in the split.
        """
        failures = {}
        for i, place in enumerate(self.places.tolist()):
            try:
                look(self.samples.read(i, MAX_BYTES_PER_PIXEL * MAX_PIXELS))
            except ImageError as error:
                failures[place] = str(error)
        return failures


def make_chunks(dataset: Dataset, places: Int) -> Iterator[Chunk]:
    """Chunks of the samples at some places; of tar shards, each shard from its start to its end."""
    if (reader := dataset.reader) is not None:
        places = places[np.lexsort((reader.offsets[places], reader.shard_of[places]))]
    for first in range(0, len(places), CHUNK):
        chunk = places[first : first + CHUNK]
        yield Chunk(chunk, dataset.take(chunk))
