"""A batch on its way to a decoder: the encoded images, or where they lie, and how each is cropped.

Legend: N images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipeline.decode.stand_in import MemoryFile
from data_pipeline.transforms.crop import CropParams

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class FilePaths:
    """Files that the decoder reads by itself.

    Attributes:
        paths: (N, longest + 1) uint8, the paths in the file system's encoding, filled up with zeros.
        lengths: (N) int64, bytes that each file must have; one of another length is not decoded.
    """

    paths: Bytes
    lengths: npt.NDArray[np.int64]

    def replace(self, index: int, path: str, length: int) -> None:
        """Put another file in the place of one; `paths` and `lengths` are changed.

        Raises:
            ValueError: a path longer than the others.
        """
        encoded = np.frombuffer(os.fsencode(path), np.uint8)
        if len(encoded) >= self.paths.shape[1]:
            raise ValueError(f"{path} does not fit into {self.paths.shape[1]} bytes")
        self.paths[index] = 0
        self.paths[index, : len(encoded)] = encoded
        self.lengths[index] = length


@dataclass(frozen=True, eq=False)
class Feed:
    """N images, all of a kind that the decoder reads: it decodes all of them, or refuses the batch.

    Attributes:
        files: N times the bytes of a file, none of them empty; or the files' paths.
        sizes: (N, 2) int64, the upright sizes for which the crops were computed. A file of another size must
            not be cropped by them.
        crops: N crops.
        temporary: keeps the files of some of the paths until the batch is decoded.
    """

    files: Sequence[Bytes] | FilePaths
    sizes: npt.NDArray[np.int64]
    crops: CropParams
    temporary: tuple[MemoryFile, ...] = ()

    def __len__(self) -> int:
        return len(self.sizes)
