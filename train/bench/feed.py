"""A backend that decodes nothing, to measure what all else costs: for `alexnet bench data`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numba
import numba.extending
import numpy as np
import numpy.typing as npt

from data_pipeline.decode.dali import DEPTH
from data_pipeline.decode.dali_graph import Graph, GraphSpec, Place
from data_pipeline.decode.dali_queue import GraphQueue
from data_pipeline.decode.feed import Feed, FilePaths
from data_pipeline.decode.pillow import Decoded
from data_pipeline.transforms.crop import CropParams

_numba: Any = numba


class FeedOnly:
    """A backend that takes batches as DALI's fast way does, and decodes nothing: what all but decoding costs.

    A batch's "images" are (N) uint64, the exclusive or of each file's eight-byte words; zeros for paths,
    whose files DALI reads.
    """

    name, device, takes_feeds, max_batch_bytes = "none", "cpu", True, None

    def __init__(self, paths: bool, max_batch: int, num_threads: int) -> None:
        self.max_batch = max_batch
        place = Place("cpu", 0, max_batch, num_threads)
        graph = Graph(GraphSpec(paths, "none", crop_px=None, depth=DEPTH), place)
        self._queue = GraphQueue(lambda _: graph)

    def decode_fast(self, plan: Callable[[], Feed]) -> object:
        """Read a batch."""
        output = self._queue.submit(plan).result()
        assert output.as_known
        if isinstance(output.feed.files, FilePaths):
            return np.zeros(len(output.feed), np.uint64)
        return checksums(output.feed.files)

    def decode(self, encoded: Sequence[bytes | None], crops: CropParams) -> Decoded:
        """Refuse: no file of the benchmark goes the slow way."""
        raise AssertionError("a batch was refused")

    def distrust_fast(self, explained: bool) -> None:
        """Do nothing."""

    def log_pillow(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """End the thread."""
        self._queue.close()


def checksums(files: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint64]:
    """The exclusive or of each file's eight-byte words, (N); the rest, of fewer bytes, is left out.

    All of it is one call that needs no interpreter: one for each file would let go of it each time, and
    measure how threads hand it over.

    >>> checksums([np.arange(24, dtype=np.uint8)]).view(np.uint8).tolist()
    [24, 25, 26, 27, 28, 29, 30, 31]
    """
    addresses = np.fromiter((file.__array_interface__["data"][0] for file in files), np.int64, len(files))
    sizes = np.fromiter(map(len, files), np.int64, len(files))
    found = np.empty(len(files), np.uint64)
    _compiled()(addresses, sizes, found)
    return found


@lru_cache(maxsize=1)
def _compiled() -> Any:
    types = _numba.types

    @_numba.extending.intrinsic  # type: ignore[untyped-decorator]
    def pointer(_: Any, address: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(types.uint64)(types.intp), emit

    @_numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def combine(addresses: Any, sizes: Any, found: Any) -> None:
        for i in range(len(addresses)):
            combined = np.uint64(0)
            for word in _numba.carray(pointer(addresses[i]), sizes[i] // 8):
                combined ^= word
            found[i] = combined

    return combine
