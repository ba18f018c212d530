"""The section with the first convolution's filters, as in figure 3 of the paper.

Shapes: K filters, of H rows and W columns, 3 channels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.errors import CorruptFileError
from infer.bundle.load import load_bundle
from infer.bundle.schema import ONNX_NAME
from infer.report.page import drawing, figure, note
from infer.report.source import Source

if TYPE_CHECKING:
    from pathlib import Path

CELL_PX = 44
"""Side of a filter in the picture, about."""
COLUMNS = 16


def make_filters(source: Source) -> str:
    """Draw the filters of the checkpoint, or of the export where there is no checkpoint."""
    if source.checkpoint is not None:
        weights = source.checkpoint.weights
        first = next(tensor for name, tensor in weights.items() if tensor.ndim == 4)
        filters_KHW3, origin = first.float().permute(0, 2, 3, 1).numpy(), "the checkpoint"
    elif source.export is not None:
        try:
            filters_KHW3 = onnx_filters(load_bundle(source.export).onnx_path)
        except ModuleNotFoundError as error:
            return note(f"{error.name} is not installed here, which reads {ONNX_NAME}.")
        except LookupError:
            return note(f"The first convolution of {ONNX_NAME} stores no weights.")
        except CorruptFileError:
            return note(f"The export {source.export.name} is not what was exported.")
        origin = f"{ONNX_NAME} of export {source.export.name}"
    else:
        return note(f"Not shown: {source.no_checkpoint}.")
    count, height, width, _ = filters_KHW3.shape
    caption = (
        f"The {count} filters of {height} × {width} × 3 weights that the first convolution learned, from "
        f"{origin}, as in figure 3 of Krizhevsky et al. 2012. Red, green and blue are the weights for these "
        "channels; each filter is scaled by itself so that its least weight is 0 and its largest full "
        "brightness: shapes can be compared, strengths cannot. Grey is a weight of about the middle."
    )
    alt = f"{count} small squares of colour, one for each filter"
    return figure(drawing(filter_grid(filters_KHW3), alt), caption)


def filter_grid(filters_KHW3: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lay filters out in a grid, each scaled to 0..255 by itself, with white between them.

    Args:
        filters_KHW3: weights.
    Returns:
        (rows, columns, 3) uint8; filters are enlarged by a whole factor, to about `CELL_PX`.
    """
    count, height, width, _ = filters_KHW3.shape
    least = filters_KHW3.min(axis=(1, 2, 3), keepdims=True)
    span = filters_KHW3.max(axis=(1, 2, 3), keepdims=True) - least
    scaled = (filters_KHW3 - least) / np.where(span > 0, span, 1)
    factor = max(1, round(CELL_PX / max(height, width)))
    cells = np.rint(scaled * 255).astype(np.uint8).repeat(factor, axis=1).repeat(factor, axis=2)
    columns = min(COLUMNS, count)
    rows, gap = math.ceil(count / columns), 3
    high, wide = height * factor + gap, width * factor + gap
    grid = np.full((rows * high - gap, columns * wide - gap, 3), 255, dtype=np.uint8)
    for number, cell in enumerate(cells):
        top, left = number // columns * high, number % columns * wide
        grid[top : top + high - gap, left : left + wide - gap] = cell
    return grid


def onnx_filters(path: Path) -> NDArray[np.float32]:
    """The weights of the first convolution of an ONNX file, also where they are stored in int8.

    Returns:
        (K, H, W, 3) float32.
    Raises:
        LookupError: there is no such convolution, or it computes its weights.
    """
    import onnx

    graph = onnx.load(str(path)).graph
    stored: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    name = next((node.input[1] for node in graph.node if node.op_type == "Conv"), "")
    maker, scale_K = makers.get(name), np.ones(1)
    if maker is not None and maker.op_type == "DequantizeLinear":
        name, scale_K = maker.input[0], onnx.numpy_helper.to_array(stored[maker.input[1]])
    weights_K3HW = onnx.numpy_helper.to_array(stored[name]).astype(np.float32)
    filters_K3HW = weights_K3HW * scale_K.astype(np.float32).reshape(-1, 1, 1, 1)
    return np.transpose(filters_K3HW, (0, 2, 3, 1))
