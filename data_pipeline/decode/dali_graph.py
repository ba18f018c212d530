"""Builds and runs the DALI graphs. One code path for CPU and GPU; only the device's name differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import nvidia.dali
import nvidia.dali.fn
import nvidia.dali.types

from data_pipeline.transforms.crop import CropParams

dali: Any = nvidia.dali  # its stubs declare neither the types' names nor the pipeline's methods


def make_graph(
    device: Literal["cpu", "gpu"],
    device_id: int,
    max_batch: int,
    num_threads: int,
    *,
    crop_px: int | None,
    views: tuple[int, ...] = (),
    colors: bool = False,
) -> Any:
    """Build a pipeline for `run_graph`.

    Args:
        device: where it runs, from the decoding on.
        device_id: which GPU.
        max_batch: most samples in one run.
        num_threads: DALI's own threads.
        crop_px: side of the crop; None for a graph that decodes the windows and no more.
        views: (V,) for V crops of each image, else ().
        colors: whether a colour matrix is applied.
    """
    types = dali.types
    pipeline = dali.Pipeline(
        batch_size=max_batch,
        num_threads=num_threads,
        device_id=device_id if device == "gpu" else None,
        # Each run must return the batch that it was fed: from a deeper queue would come an older one. The
        # loader's threads run ahead instead.
        prefetch_queue_depth=1,
    )
    with pipeline:
        images = dali.fn.decoders.image_slice(
            _source("encoded", types.UINT8, 1),
            _source("starts", types.INT32, 1),
            _source("shapes", types.INT32, 1),
            axes=[0, 1],
            device="mixed" if device == "gpu" else "cpu",
            output_type=types.RGB,
            adjust_orientation=True,
            jpeg_fancy_upsampling=True,  # what libjpeg does; without it nvJPEG's colours differ at edges
        )
        if crop_px is not None:
            images = _transform(images, crop_px, views, colors)
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def run_graph(pipeline: Any, files: Sequence[bytes], crops: CropParams, *, whole: bool) -> Any:
    """Run a graph over a batch.

    Args:
        pipeline: from `make_graph`.
        files: N files' bytes.
        crops: N crops, of the kind of the graph.
        whole: whether the graph does more than decode the windows.
    Returns:
        DALI's tensor list.
    Raises:
        RuntimeError: DALI refuses a file, and with it the batch.
    """
    inputs: dict[str, object] = {
        "encoded": [np.frombuffer(data, dtype=np.uint8) for data in files],
        "starts": crops.windows[:, :2].astype(np.int32),
        "shapes": crops.windows[:, 2:].astype(np.int32),
    }
    if whole:
        inputs["sizes"] = crops.sizes.astype(np.float32)
        inputs["offsets"] = crops.offsets.astype(np.int32)
        inputs["flips"] = crops.flips.astype(np.int32)
        if crops.colors is not None:
            inputs["linear"] = np.ascontiguousarray(crops.colors[:, :, :3])
            inputs["offset"] = np.ascontiguousarray(crops.colors[:, :, 3])
    (output,) = pipeline.run(**inputs)
    return output


def _transform(images: Any, crop_px: int, views: tuple[int, ...], colors: bool) -> Any:
    """Resize, colour, crop and mirror."""
    fn, types = dali.fn, dali.types
    sizes = _source("sizes", types.FLOAT, 1)
    offsets = _source("offsets", types.INT32, 1 + len(views))
    flips = _source("flips", types.INT32, len(views))
    images = fn.resize(images, size=sizes, interp_type=types.INTERP_LINEAR, antialias=True)
    if colors:
        linear, offset = _source("linear", types.FLOAT, 2), _source("offset", types.FLOAT, 1)
        images = fn.coord_transform(images, M=linear, T=offset, dtype=types.UINT8)
        images = fn.reshape(images, layout="HWC")

    def view(offset: Any, flip: Any) -> Any:
        crop = fn.slice(images, start=offset, shape=[crop_px, crop_px], axes=[0, 1])
        return fn.flip(crop, horizontal=flip)

    if not views:
        return view(offsets, flips)
    return fn.stack(*(view(offsets[i], flips[i]) for i in range(views[0])))


def _source(name: str, dtype: Any, ndim: int) -> Any:
    return dali.fn.external_source(name=name, dtype=dtype, ndim=ndim)
