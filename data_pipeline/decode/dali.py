"""Decodes with DALI, on CPU and GPU. With `dali_graph`, the only file that imports nvidia.dali.

DALI decodes with libjpeg-turbo (CPU) or nvJPEG (GPU), by the policy in `data_pipeline.decode.pillow`. Sizes
and windows come from Python, so the two backends crop the same pixels. On a GPU all of it is one graph,
and the images stay there. On the CPU, DALI decodes the windows; `resize` does the rest, on as many threads:
DALI's resize takes longer there than its decoding, and ours gives the Pillow backend's pixels to the bit.

There are two ways through DALI. The fast one (`decode_fast`) takes batches of which everything is known,
with several in flight. A batch that it refuses goes the slow way (`decode`), alone: there, the files that
DALI cannot read, or would read although they are damaged, are found, read by Pillow and handed to the same
graph as BMP, so that every batch is one output of one graph, on its device.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_pipeline.common.errors import ImageError
from data_pipeline.common.machine import share_memory_arenas
from data_pipeline.decode.dali_graph import Graph, GraphSpec, Place
from data_pipeline.decode.dali_queue import GraphQueue
from data_pipeline.decode.feed import Feed, FilePaths, black_pixel, cut_as_bmp
from data_pipeline.decode.look import is_for_pillow
from data_pipeline.decode.pillow import Decoded, blank_images, parallel_for
from data_pipeline.decode.resize import Resizer
from data_pipeline.transforms.crop import CropParams

log = logging.getLogger("data_pipeline")

DEPTH = 3
"""Batches in flight on the fast way: more gain nothing, and hold memory."""
MAX_UNEXPLAINED = 3
"""Batches in a row that the fast way refuses without a bad file, until it is given up."""


class DaliBackend:
    """Decodes batches with DALI. Any number of threads may call it.

    Args:
        device: "cpu", or "gpu" for decoding and resizing there; then images stay there.
        device_id: which GPU.
        crop_px: side of the square that comes out.
        max_batch: most samples in one call.
        num_threads: threads for decoding, and as many for resizing on the CPU.
        whole_graph: whether DALI resizes, crops and colours too; None for yes on a GPU, no on the CPU.
        deterministic: whether a GPU decodes a file to the same bytes each time, without its hardware decoder.
        max_decoded_bytes: bound on the decoded images of all batches in flight, where images decode whole.
    """

    name = "dali"
    takes_feeds = True

    def __init__(
        self,
        device: Literal["cpu", "gpu"],
        device_id: int,
        crop_px: int,
        max_batch: int,
        num_threads: int,
        whole_graph: bool | None = None,
        deterministic: bool = False,
        max_decoded_bytes: int = 2_000_000_000,
    ) -> None:
        if device == "cpu":
            share_memory_arenas()
        self.device: str = device
        self.max_batch = max_batch
        self._whole_graph = device == "gpu" if whole_graph is None else whole_graph
        self._max_decoded_bytes = max_decoded_bytes
        self._crop_px, self._num_threads = crop_px, max(1, num_threads)
        self._place = Place(device, device_id, max_batch, self._num_threads, deterministic)
        self._resizer = None if self._whole_graph else Resizer()
        self._lock = threading.Lock()  # of the slow way, whose graphs one thread at a time may run
        self._fast: dict[GraphSpec, Graph] = {}  # of DALI's thread alone
        self._graphs: dict[GraphSpec, Graph] = {}
        self._queue = GraphQueue(self._fast_graph)
        self._slowed, self._unexplained = False, 0
        self._logged = False
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="resize")

    @property
    def max_batch_bytes(self) -> int | None:
        """Bytes to which the images of one batch may decode; None where no image is decoded whole."""
        whole = self._whole_graph and not self._slowed
        return self._max_decoded_bytes // (DEPTH + 1) if whole else None

    def decode_fast(self, plan: Callable[[], Feed]) -> object | None:
        """Decode a batch of known files, while others are in flight.

        Args:
            plan: makes the batch's feed, in DALI's thread.
        Returns:
            As `Decoded.images`; None if DALI refuses a file, or one is of another size than its crop is for:
            the batch must then go through `decode`, with the sizes that the files have now.
        """
        try:
            output = self._queue.submit(plan).result()
        except RuntimeError as error:
            log.debug("DALI refused a batch: %s", error)
            return None
        return self._images(output.images, output.feed.crops) if output.as_known else None

    def distrust_fast(self, explained: bool) -> None:
        """Count a refusal of the fast way; leave that way if it refuses what the slow one takes as it is.

        Args:
            explained: whether a file was found for which the batch was refused.
        """
        self._unexplained = 0 if explained else self._unexplained + 1
        if self._unexplained >= MAX_UNEXPLAINED and not self._slowed:
            self._slow_down("it refuses batches without a bad file")

    def decode(self, encoded: Sequence[bytes | None], crops: CropParams) -> Decoded:
        """Decode a batch, alone; a file that fails leaves zeros and its reason.

        Args:
            encoded: N files' bytes, N at most `max_batch`; None leaves zeros.
            crops: N crops.
        Returns:
            A NumPy array, or on a GPU DALI's tensor. Both stay valid: the array is our own, and DALI's
            dynamic executor gives every output memory of its own.
        """
        assert crops.crop_px == self._crop_px and len(encoded) <= self.max_batch
        work = _Work(encoded, crops)
        for i, data in enumerate(encoded):
            if data is not None and is_for_pillow(data):
                work.transcode(i)
        with self._lock:  # only for DALI: while this thread holds it, another may transcode or resize
            while (output := self._run(work.files, work.crops)) is None:
                for i in self._refused(work.files, work.crops, np.arange(len(work.files))):
                    work.transcode(i)
        if work.transcoded:
            self.log_pillow()
        images = self._images(output, work.crops, work.blank)
        return Decoded(images, work.failures, frozenset(work.transcoded))

    def log_pillow(self) -> None:
        """Log, once, that Pillow decodes some of the files."""
        if not self._logged:
            self._logged = True
            log.info("DALI cannot read some of the files (GIF, TIFF, ...): Pillow decodes those, more slowly")

    def close(self) -> None:
        """Free the graphs, their threads and their memory."""
        self._queue.close()
        self._fast.clear()
        self._graphs.clear()
        self._pool.shutdown()

    def _spec(self, crops: CropParams, *, paths: bool, depth: int) -> GraphSpec:
        if not self._whole_graph:
            return GraphSpec(paths, "window", crop_px=None, depth=depth)
        depth = 1 if self._slowed else depth
        colors = crops.colors is not None
        decode: Literal["window", "whole"] = "window" if self._slowed else "whole"
        return GraphSpec(paths, decode, self._crop_px, crops.views, colors, depth)

    def _fast_graph(self, feed: Feed) -> Graph:
        """The graph of a feed on the fast way; where that fails, a slower one, with a log line."""
        assert feed.crops.crop_px == self._crop_px and len(feed) <= self.max_batch
        spec = self._spec(feed.crops, paths=isinstance(feed.files, FilePaths), depth=DEPTH)
        if spec not in self._fast:
            try:
                self._fast[spec] = Graph(spec, self._place)
            except RuntimeError as error:
                if spec.decode != "whole":
                    raise
                self._slow_down(str(error).strip().splitlines()[-1])
                return self._fast_graph(feed)
        return self._fast[spec]

    def _slow_down(self, reason: str) -> None:
        self._slowed = True
        log.warning(
            "DALI's fast way fails on this %s (%s): windows are decoded, a batch at a time, more slowly",
            self.device, reason,
        )  # fmt: skip

    def _images(
        self, output: Any, crops: CropParams, blank: frozenset[int] | set[int] = frozenset()
    ) -> object:
        """Finish DALI's output; on the CPU, images that are `blank` stay zeros."""
        if (resizer := self._resizer) is not None:
            images = blank_images(crops)

            def resize(i: int) -> None:
                if i not in blank:
                    resizer.finish_into(images, output.at(i), crops, i)

            parallel_for(resize, len(images), self._pool, self._num_threads)
            return images
        if self.device == "cpu":
            return np.array(output.as_array())
        tensor: object = output.as_tensor()
        return tensor

    def _refused(
        self, files: Sequence[bytes], crops: CropParams, indices: npt.NDArray[np.int64]
    ) -> list[int]:
        """Find the samples that DALI refuses, by halving: a bad file costs two more decodes of its batch."""
        refused: list[int] = []
        for half in np.array_split(indices, 2 if len(indices) > 1 else 1):
            if self._run([files[i] for i in half], crops.take(half)) is None:
                refused += self._refused(files, crops, half) if len(half) > 1 else [int(half[0])]
        return refused

    def _run(self, files: Sequence[bytes], crops: CropParams) -> Any:
        """Run a graph of the slow way; None if DALI refuses the batch."""
        spec = self._spec(crops, paths=False, depth=1)
        if spec not in self._graphs:
            self._graphs[spec] = Graph(spec, self._place)
        feed = Feed([np.frombuffer(data, dtype=np.uint8) for data in files], crops.sizes, crops)
        try:
            self._graphs[spec].push(feed)
            output, _ = self._graphs[spec].pop()
        except RuntimeError as error:
            log.debug("DALI refused a batch of %d: %s", len(files), error)
            return None
        return output


class _Work:
    """A batch on its slow way through DALI: the bytes that are fed for each sample, and how it is cropped."""

    # A sample is in one of three states; `transcode` moves it on, and it moves once.
    #   its own file: as long as DALI reads it. If Pillow reads it then, it is transcoded; if not, blank.
    #   transcoded: the window as Pillow cuts and resizes it, as BMP.
    #   blank: a black pixel, whose crop becomes zeros; it has a failure, unless there were no bytes at all.
    # DALI cannot refuse the last two; if it does, the pipeline is broken, and that is an error.

    def __init__(self, encoded: Sequence[bytes | None], crops: CropParams) -> None:
        self.files = [black_pixel() if data is None else data for data in encoded]
        self.crops = crops.take(range(len(crops)))
        self.transcoded: set[int] = set()
        self.blank = {i for i, data in enumerate(encoded) if data is None}
        self.failures: dict[int, str] = {}
        for i in self.blank:
            self.crops.set_blank(i)

    def transcode(self, index: int) -> None:
        """Replace one file by the window that Pillow reads in it, or by a black pixel if that fails too."""
        if index in self.blank or index in self.transcoded:
            raise RuntimeError("DALI refuses an image of our own making: its pipeline is broken")
        try:
            self.files[index] = cut_as_bmp(self.files[index], self.crops, index)
            self.crops.set_cut(index)
            self.transcoded.add(index)
        except ImageError as error:
            self.failures[index] = str(error)
            self.blank.add(index)
            self.files[index] = black_pixel()
            self.crops.set_blank(index)
