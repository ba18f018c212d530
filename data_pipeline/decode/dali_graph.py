"""Builds and runs the DALI graphs. One code path for CPU and GPU; only the device's name differs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import nvidia.dali
import nvidia.dali.fn
import nvidia.dali.tensors
import nvidia.dali.types
from PIL import Image

from data_pipeline.decode.feed import MAX_MEMORY_PATH, Bytes, Feed, FilePaths, MemoryFile
from data_pipeline.transforms.crop import CropParams

dali: Any = nvidia.dali  # its stubs declare neither the types' names nor the pipeline's methods

HARDWARE_LOAD = 0.9
"""Share of a batch's JPEGs for the GPU's own decoder, where it has one: the fastest measured (one H200)."""


@dataclass(frozen=True)
class GraphSpec:
    """Settings of a DALI graph.

    Attributes:
        paths: whether it is fed paths, and reads the files; else the files' bytes.
        decode: "whole" images, whose windows are cut then; "window" for the decoder to decode no more than
            those.
        crop_px: side of the crop; None for a graph that decodes and cuts the windows and no more.
        views: (V,) for V crops of each image, else ().
        colors: whether a colour matrix is applied.
        depth: batches in flight at once, >= 1.
    """

    paths: bool
    decode: Literal["whole", "window"]
    crop_px: int | None
    views: tuple[int, ...] = ()
    colors: bool = False
    depth: int = 1


@dataclass(frozen=True)
class Place:
    """Where graphs run: the device from the decoding on, and DALI's own threads.

    Attributes:
        device: "cpu", or "gpu".
        device_id: which GPU.
        max_batch: most samples in one run.
        num_threads: DALI's threads.
        deterministic: the same bytes each time: no GPU's hardware decoder, whose share depends on the moment.
    """

    device: Literal["cpu", "gpu"]
    device_id: int
    max_batch: int
    num_threads: int
    deterministic: bool = False


class Graph:
    """A DALI pipeline that is fed our own order, with up to `spec.depth` batches in flight.

    One thread at a time may call it. Building it decodes a first batch, so that a device on which it cannot
    work fails here, and not in the first batch of a run.

    Raises:
        RuntimeError: DALI cannot build it, or decodes nothing on this device.
    """

    def __init__(self, spec: GraphSpec, place: Place) -> None:
        self.spec = spec
        self._pipeline = _build(spec, place)
        first = _first_batch(spec)
        for _ in range(spec.depth):
            self._feed(first)
        self._pipeline.schedule_run()  # the first call begins as many runs as there may be in flight
        for _ in range(spec.depth):
            self.pop()

    def push(self, feed: Feed) -> None:
        """Begin to decode a batch. The feed must be kept until it is popped: its bytes are not copied."""
        self._feed(feed)
        self._pipeline.schedule_run()

    def pop(self) -> tuple[Any, npt.NDArray[np.int64] | None]:
        """Wait for the oldest batch in flight. Later batches do not suffer from one that fails.

        Returns:
            DALI's tensor list, whose memory is its own; and, where it read the files, (N, 2) the upright
            sizes by their headers.
        Raises:
            RuntimeError: DALI refuses a file, and with it the batch.
        """
        images, *shapes = self._pipeline.share_outputs()  # nothing is to be released if this raises
        sizes = np.array(shapes[0].as_array())[:, :2].astype(np.int64) if shapes else None
        self._pipeline.release_outputs()
        return images, sizes

    def _feed(self, feed: Feed) -> None:
        crops, put = feed.crops, self._pipeline.feed_input
        if isinstance(feed.files, FilePaths):
            put("paths", feed.files.paths)
            put("lengths", feed.files.lengths[:, None].astype(np.int32))
        else:
            tensor = dali.tensors.TensorCPU
            put("encoded", [tensor(file, "") for file in feed.files])  # a third faster than arrays
        put("starts", crops.windows[:, :2].astype(np.int32))
        put("shapes", crops.windows[:, 2:].astype(np.int32))
        if self.spec.crop_px is None:
            return
        put("sizes", crops.sizes.astype(np.float32))
        put("offsets", crops.offsets.astype(np.int32))
        put("flips", crops.flips.astype(np.int32))
        if crops.colors is not None:
            put("linear", np.ascontiguousarray(crops.colors[:, :, :3]))
            put("offset", np.ascontiguousarray(crops.colors[:, :, 3]))


def _build(spec: GraphSpec, place: Place) -> Any:
    fn, types, gpu = dali.fn, dali.types, place.device == "gpu"
    pipeline = dali.Pipeline(
        batch_size=place.max_batch,
        num_threads=place.num_threads,
        device_id=place.device_id if gpu else None,
        prefetch_queue_depth=spec.depth,
        exec_dynamic=True,  # without it, one batch that fails ends the pipeline
    )
    with pipeline:
        if spec.paths:
            encoded = fn.io.file.read(_source("paths", types.UINT8, 1))
            # A file of another length than was looked at is refused here, before anything is decoded.
            encoded = fn.reshape(encoded, shape=_source("lengths", types.INT32, 1))
        else:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
        starts, shapes = _source("starts", types.INT32, 1), _source("shapes", types.INT32, 1)
        options: dict[str, Any] = {
            "device": "mixed" if gpu else "cpu",
            "output_type": types.RGB,
            "adjust_orientation": True,
            "jpeg_fancy_upsampling": True,  # what libjpeg does; without it nvJPEG's colours differ at edges
        }
        if gpu:
            options["hw_decoder_load"] = 0.0 if place.deterministic else HARDWARE_LOAD
        if spec.decode == "whole":
            images = fn.decoders.image(encoded, **options)
            images = fn.slice(images, start=starts, shape=shapes, axes=[0, 1])
        else:
            images = fn.decoders.image_slice(encoded, starts, shapes, axes=[0, 1], **options)
        if spec.crop_px is not None:
            images = _transform(images, spec.crop_px, spec.views, spec.colors)
        # Bytes were looked at before they were fed; what DALI reads by itself is looked at here.
        pipeline.set_outputs(*((images, fn.peek_image_shape(encoded)) if spec.paths else (images,)))
    pipeline.build()
    return pipeline


def _transform(images: Any, crop_px: int, views: tuple[int, ...], colors: bool) -> Any:
    """Resize, crop, colour and mirror."""
    fn, types = dali.fn, dali.types
    sizes = _source("sizes", types.FLOAT, 1)
    offsets = _source("offsets", types.INT32, 1 + len(views))
    flips = _source("flips", types.INT32, len(views))
    images = fn.resize(images, size=sizes, interp_type=types.INTERP_LINEAR, antialias=True)
    if colors:
        linear, offset = _source("linear", types.FLOAT, 2), _source("offset", types.FLOAT, 1)

    def view(place: Any, flip: Any) -> Any:
        crop = fn.slice(
            images,
            start=place,
            shape=[crop_px, crop_px],
            axes=[0, 1],
            out_of_bounds_policy="pad",
            fill_values=0,
        )
        if colors:
            crop = fn.coord_transform(crop, M=linear, T=offset, dtype=types.UINT8)
            crop = fn.reshape(crop, layout="HWC")
        return fn.flip(crop, horizontal=flip)

    if not views:
        return view(offsets, flips)
    return fn.stack(*(view(offsets[i], flips[i]) for i in range(views[0])))


def _source(name: str, dtype: Any, ndim: int) -> Any:
    return dali.fn.external_source(name=name, dtype=dtype, ndim=ndim)


def _first_batch(spec: GraphSpec) -> Feed:
    """One JPEG, which goes the same way as the files of a run."""
    side = 16
    crop_px, views = spec.crop_px or side, spec.views
    crops = CropParams(
        windows=np.array([[0, 0, side, side]]),
        sizes=np.full((1, 2), crop_px),
        offsets=np.zeros((1, *views, 2), dtype=np.int64),
        flips=np.zeros((1, *views), dtype=np.bool_),
        crop_px=crop_px,
        colors=np.eye(3, 4, dtype=np.float32)[None] if spec.colors else None,
    )
    data = _jpeg(side)
    files: Sequence[Bytes] | FilePaths = [np.frombuffer(data, np.uint8)]
    temporary: tuple[MemoryFile, ...] = ()
    if spec.paths:
        temporary = (MemoryFile(data),)
        files = FilePaths(np.zeros((1, MAX_MEMORY_PATH), np.uint8), np.zeros(1, np.int64))
        files.replace(0, temporary[0].path, len(data))
    return Feed(files, np.array([[side, side]]), crops, temporary)


@lru_cache(maxsize=1)
def _jpeg(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG")
    return buffer.getvalue()
