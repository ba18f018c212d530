"""Decodes with DALI, on CPU and GPU. With `dali_graph`, the only file that imports nvidia.dali.

DALI decodes with libjpeg-turbo (CPU) or nvJPEG (GPU), by the policy in `data_pipeline.decode.pillow`. Sizes
and windows come from Python, so the two backends crop the same pixels. On a GPU all of it is one graph,
and the images stay there. On the CPU, DALI decodes the windows; `resize` does the rest, on as many threads:
DALI's resize takes longer there than its decoding, and ours gives the Pillow backend's pixels to the bit.

Files that DALI cannot read, or would read although they are damaged, are read by Pillow and handed to the
same graph as BMP, so that every batch is one output of one graph, on its device.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipeline.common.errors import ImageError
from data_pipeline.common.machine import share_memory_arenas
from data_pipeline.decode.dali_graph import make_graph, run_graph
from data_pipeline.decode.look import is_for_pillow
from data_pipeline.decode.pillow import Decoded, blank_images, decode_rgb, parallel_for
from data_pipeline.decode.resize import Resizer
from data_pipeline.transforms.crop import CropParams

log = logging.getLogger("data_pipeline")


class DaliBackend:
    """Decodes batches with DALI. Calls from several threads overlap: one decodes while another resizes.

    Args:
        device: "cpu", or "gpu" for decoding and resizing there; then `Decoded.images` stays there.
        device_id: which GPU; unused on the CPU.
        crop_px: side of the square that comes out.
        max_batch: most samples in one call.
        num_threads: threads for decoding, and as many for resizing on the CPU.
        whole_graph: whether DALI resizes, crops and colours too; None for yes on a GPU, no on the CPU.
    """

    name = "dali"

    def __init__(
        self,
        device: Literal["cpu", "gpu"],
        device_id: int,
        crop_px: int,
        max_batch: int,
        num_threads: int,
        whole_graph: bool | None = None,
    ) -> None:
        if device == "cpu":
            share_memory_arenas()
        self.device: str = device
        self.max_batch = max_batch
        self._whole_graph = device == "gpu" if whole_graph is None else whole_graph
        self._crop_px, self._device_id, self._num_threads = crop_px, device_id, max(1, num_threads)
        self._resizer = None if self._whole_graph else Resizer()
        self._lock = threading.Lock()  # a DALI graph must not be run by two threads at once
        self._logged = False
        self._graphs: dict[tuple[tuple[int, ...], bool], Any] = {}
        self._pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="resize")

    def decode(self, encoded: Sequence[bytes | None], crops: CropParams) -> Decoded:
        """Decode a batch; a file that fails leaves zeros and its reason.

        Args:
            encoded: N files' bytes, N at most `max_batch`; None leaves zeros.
            crops: N crops.
        Returns:
            A NumPy array, or on a GPU DALI's tensor. Both stay valid: the array is our own, and DALI's
            default executor gives every output memory of its own.
        """
        assert crops.crop_px == self._crop_px and len(encoded) <= self.max_batch
        work = _Work(encoded, crops)
        for i, data in enumerate(encoded):
            if data is not None and is_for_pillow(data):
                work.transcode(i)
        with self._lock:  # only for DALI: while this thread holds it, another may transcode or resize
            output = self._run(work.files, work.fed_crops())
            while output is None:  # at most twice: see the states of `_Work`
                for i in self._refused(work.files, work.fed_crops(), np.arange(len(work.files))):
                    work.transcode(i)
                output = self._run(work.files, work.fed_crops())
        if work.transcoded and not self._logged:
            self._logged = True
            log.info("DALI cannot read some of the files (GIF, TIFF, ...): Pillow decodes those, more slowly")
        return Decoded(self._images(output, work), work.failures)

    def close(self) -> None:
        """Free the graphs, their threads and their memory."""
        self._graphs.clear()
        self._pool.shutdown()

    def _images(self, output: Any, work: _Work) -> object:
        if (resizer := self._resizer) is not None:
            images = blank_images(work.crops)

            def resize(i: int) -> None:
                if i not in work.blank:
                    resizer.finish_into(images, output.at(i), work.crops, i)

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
        """Run the graph for this kind of crops; None if DALI refuses the batch."""
        kind = (crops.views, crops.colors is not None) if self._whole_graph else ((), False)
        if kind not in self._graphs:
            self._graphs[kind] = make_graph(
                "gpu" if self.device == "gpu" else "cpu", self._device_id, self.max_batch, self._num_threads,
                crop_px=self._crop_px if self._whole_graph else None, views=kind[0], colors=kind[1],
            )  # fmt: skip
        try:
            return run_graph(self._graphs[kind], files, crops, whole=self._whole_graph)
        except RuntimeError as error:
            log.debug("DALI refused a batch of %d: %s", len(files), error)
            return None


class _Work:
    """A batch on its way through DALI: the bytes that are fed for each sample, and its state."""

    # A sample is in one of three states; `transcode` moves it on, and it moves at most twice.
    #   its own file: as long as DALI reads it. If Pillow reads it then, it is transcoded; if not, blank.
    #   transcoded: Pillow's pixels as BMP. If DALI refuses that, its window lies outside of it: blank.
    #   blank: a black pixel, whose crop becomes zeros; it has a failure, unless there were no bytes at all.
    #     DALI cannot refuse that; if it does, the pipeline is broken, and that is an error.

    def __init__(self, encoded: Sequence[bytes | None], crops: CropParams) -> None:
        self.files = [_black() if data is None else data for data in encoded]
        self.crops = crops
        self.transcoded: set[int] = set()
        self.blank = {i for i, data in enumerate(encoded) if data is None}
        self.failures: dict[int, str] = {}

    def transcode(self, index: int) -> None:
        """Replace one file by the pixels that Pillow reads in it, or by a black pixel if that fails too."""
        if index in self.blank:
            raise RuntimeError("DALI refuses the blank image: its pipeline is broken")
        try:
            if index in self.transcoded:  # DALI refused our own BMP: the window is not inside it
                self.transcoded.discard(index)
                raise ImageError("its header and its pixels disagree about the size")
            self.files[index] = _as_bmp(decode_rgb(self.files[index]))
            self.transcoded.add(index)
        except ImageError as error:
            self.failures[index] = str(error)
            self.blank.add(index)
            self.files[index] = _black()

    def fed_crops(self) -> CropParams:
        """The crops to run: for each blank sample, one whose window is the black pixel that stands for it."""
        crops, blank = self.crops.take(range(len(self.crops))), sorted(self.blank)  # taken, so copied
        crops.windows[blank], crops.sizes[blank], crops.offsets[blank] = (0, 0, 1, 1), crops.crop_px, 0
        if crops.colors is not None:
            crops.colors[blank] = np.eye(3, 4)
        return crops


def _as_bmp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    return buffer.getvalue()


@lru_cache(maxsize=1)
def _black() -> bytes:
    return _as_bmp(Image.new("RGB", (1, 1)))
