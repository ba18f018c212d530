"""The DALI graph, for CPU and GPU. The only file that imports nvidia.dali, and everything that needs a GPU.

It decodes with libjpeg-turbo (CPU) or nvJPEG (GPU), and follows the policy in `pillow_backend`. Sizes and
windows come from Python, so the two backends cut the same pixels. Files that DALI cannot read, or would read
although they are damaged, are read by Pillow and handed to the same graph as BMP, so that every batch is one
output of one graph, on its device.
"""

from __future__ import annotations

import io
import logging
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import nvidia.dali
import nvidia.dali.fn
import nvidia.dali.types
from PIL import Image

from data_pipeline.faults import ImageError
from data_pipeline.geometry import Geometry
from data_pipeline.pillow_backend import Decoded, decode_rgb

log = logging.getLogger("data_pipeline")

dali: Any = nvidia.dali  # its stubs declare neither the types' names nor the pipeline's methods


class DaliBackend:
    """Decodes batches with one DALI pipeline. Calls from several threads take turns.

    Args:
        device: "cpu", or "gpu" for decoding and resizing there; then `Decoded.images` stays there.
        device_id: which GPU; unused on the CPU.
        crop_px: side of the square that comes out.
        max_batch: most samples in one call.
        num_threads: DALI's own threads.
    """

    name = "dali"

    def __init__(
        self, device: Literal["cpu", "gpu"], device_id: int, crop_px: int, max_batch: int, num_threads: int
    ) -> None:
        self.device: str = device
        self.max_batch = max_batch
        self._crop_px = crop_px
        self._lock = threading.Lock()
        self._told = False
        self._pipeline: Any = _make_pipeline(device, device_id, crop_px, max_batch, max(1, num_threads))

    def decode(self, encoded: Sequence[bytes | None], geometry: Geometry) -> Decoded:
        """Decode a batch; a file that fails leaves zeros and its reason.

        Args:
            encoded: N files' bytes, N at most `max_batch`; None leaves zeros.
            geometry: N recipes.
        Returns:
            A NumPy array, or on a GPU DALI's tensor. Both stay valid: the array is a copy, and DALI's default
            executor gives every output memory of its own.
        """
        assert geometry.crop_px == self._crop_px and len(encoded) <= self.max_batch
        work = _Work([_black() if data is None else data for data in encoded], geometry)
        work.blank.update(i for i, data in enumerate(encoded) if data is None)
        for i, data in enumerate(work.files):
            if _is_for_pillow(data):
                work.transcode(i)
        with self._lock:
            images = self._run(work.files, work.recipe())
            while images is None:  # at most twice: what DALI refuses becomes BMP, a BMP refused becomes blank
                for i in self._refused(work.files, work.recipe(), np.arange(len(work.files))):
                    work.transcode(i)
                images = self._run(work.files, work.recipe())
        if work.transcoded and not self._told:
            self._told = True
            log.info("DALI cannot read some of the files (GIF, TIFF, ...): Pillow decodes those, more slowly")
        return Decoded(images, work.failures, len(work.transcoded))

    def close(self) -> None:
        """Let go of the pipeline, its threads and its memory."""
        self._pipeline = None

    def _refused(self, files: Sequence[bytes], recipe: Geometry, indices: npt.NDArray[np.int64]) -> list[int]:
        """Which of the samples DALI refuses, by halving: one bad file costs two more decodes of its batch."""
        refused: list[int] = []
        for half in np.array_split(indices, 2 if len(indices) > 1 else 1):
            if self._run([files[i] for i in half], recipe.take(half)) is None:
                refused += self._refused(files, recipe, half) if len(half) > 1 else [int(half[0])]
        return refused

    def _run(self, files: Sequence[bytes], recipe: Geometry) -> object | None:
        """One run of the graph; None if DALI refuses the batch."""
        try:
            (images,) = self._pipeline.run(
                encoded=[np.frombuffer(data, dtype=np.uint8) for data in files],
                starts=recipe.windows[:, :2].astype(np.int32),
                shapes=recipe.windows[:, 2:].astype(np.int32),
                sizes=recipe.sizes.astype(np.float32),
                anchors=recipe.anchors.astype(np.int32),
                flips=recipe.flips.astype(np.int32),
            )
        except RuntimeError as error:
            log.debug("DALI refused a batch of %d: %s", len(files), error)
            return None
        if self.device == "cpu":
            return np.array(images.as_array())
        tensor: object = images.as_tensor()
        return tensor


class _Work:
    """A batch on its way through DALI: what is fed for each sample, and what became of it."""

    def __init__(self, files: list[bytes], geometry: Geometry) -> None:
        self.files = files
        self.failures: dict[int, str] = {}
        self.transcoded: set[int] = set()
        self.blank: set[int] = set()
        self._geometry = geometry

    def transcode(self, index: int) -> None:
        """Replace one file by what Pillow reads of it, or by a black pixel if it cannot be had either."""
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

    def recipe(self) -> Geometry:
        """The geometry, with a window for each blank sample on the black pixel that stands in its place."""
        if not self.blank:
            return self._geometry
        at = np.array(sorted(self.blank), dtype=np.int64)
        full = self._geometry
        windows, sizes, anchors = full.windows.copy(), full.sizes.copy(), full.anchors.copy()
        windows[at], sizes[at], anchors[at] = (0, 0, 1, 1), full.crop_px, 0
        return Geometry(windows, sizes, anchors, full.flips, full.crop_px)


def _make_pipeline(
    device: Literal["cpu", "gpu"], device_id: int, crop_px: int, max_batch: int, num_threads: int
) -> Any:
    """The graph: decode the window, resize, cut, mirror. One code path; only the device's name differs."""
    fn, types = dali.fn, dali.types
    pipeline = dali.Pipeline(
        batch_size=max_batch,
        num_threads=num_threads,
        device_id=device_id if device == "gpu" else None,
        prefetch_queue_depth=1,  # our own threads run ahead; a deeper queue would return an older batch
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        starts = fn.external_source(name="starts", dtype=types.INT32, ndim=1)
        shapes = fn.external_source(name="shapes", dtype=types.INT32, ndim=1)
        sizes = fn.external_source(name="sizes", dtype=types.FLOAT, ndim=1)
        anchors = fn.external_source(name="anchors", dtype=types.INT32, ndim=1)
        flips = fn.external_source(name="flips", dtype=types.INT32, ndim=0)
        images = fn.decoders.image_slice(
            encoded,
            starts,
            shapes,
            axes=[0, 1],
            device="mixed" if device == "gpu" else "cpu",
            output_type=types.RGB,
            adjust_orientation=True,
            jpeg_fancy_upsampling=True,  # what libjpeg does; without it nvJPEG's colours differ at edges
        )
        images = fn.resize(images, size=sizes, interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.slice(images, start=anchors, shape=[crop_px, crop_px], axes=[0, 1])
        pipeline.set_outputs(fn.flip(images, horizontal=flips))
    pipeline.build()
    return pipeline


def _is_for_pillow(data: bytes) -> bool:
    """Files that DALI does not know (GIF, extended WebP), or reads although cut short (TIFF, JPEG)."""
    if data.startswith(b"\xff\xd8"):
        # the end marker stands at the end, or before what a camera appended; a thumbnail's comes early
        return b"\xff\xd9" not in data[-64:] and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    return data.startswith((b"GIF8", b"II*\0", b"MM\0*")) or data[8:16] == b"WEBPVP8X"


def _as_bmp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    return buffer.getvalue()


@lru_cache(maxsize=1)
def _black() -> bytes:
    return _as_bmp(Image.new("RGB", (1, 1)))
