"""Prediction from Python: load a bundle once, give it images, get rows.

    from alexnet import Predictor, find_inputs

    with Predictor("runs/demo-20260101T000000Z/export/onnx-fp32") as predictor:
        for row in predictor(["cat.jpg", array, pillow_image]):
            print(row.path, row.status)
        rows = list(predictor(find_inputs(["images/"])))

The command line is built on it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing
from functools import cached_property
from pathlib import Path
from typing import get_args

import numpy as np
from msgspec.structs import asdict, replace
from numpy.typing import NDArray
from PIL.Image import Image

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable
from data_pipeline.loader import ImageSource, Loader
from data_pipeline.loading.batches import Batch
from infer.bundle.load import Bundle, open_bundle
from infer.bundle.schema import FeatureLayer
from infer.predict.decode import (
    DecoderName,
    SilentFaultLog,
    choose_decoder,
    fit_batch,
    host_pixels,
    open_decoder,
    run_valid,
)
from infer.predict.inputs import Item, from_pixels
from infer.predict.rows import (
    DEFAULT_BATCH,
    ErrorRow,
    FeatureRow,
    OkRow,
    PredictionWithPixels,
    Row,
    RowShape,
    Truth,
    check_top,
    names_of,
    rank_of,
    top_k,
)
from infer.runtime.choose import BackendName, DeviceName, choose_backend

Input = str | os.PathLike[str] | ImageSource | NDArray[np.uint8] | Image

NUM_VIEWS, CENTRE_VIEW = 10, 4
"""Of the paper's ten crops; and which of them is the centre, not mirrored."""


class Predictor:
    """A loaded model that predicts images in batches, read and decoded ahead; for one thread at a time.

    Args:
        bundle: the exported folder; None for the newest export under runs/; or a verified bundle.
        backend: `onnx`, `trt`, or `auto`: the engine where it can run, else ONNX Runtime.
        device: `cpu`, `cuda`, or `auto`.
        decoder: `dali`, `pillow`, or `auto`: DALI where it is installed.
        top: classes in a row; None for five, or all if the model has fewer.
        batch_size: images in a batch; lowered, with a warning, to what the model takes.
        min_probability: classes below are left out of a row, which may leave none.
        ten_crop: average the softmax of the paper's ten views of each image.
        features: a layer, `fc7`, `fc6` or `pool5`, whose features each row then has: see `FeatureRow`. The
            bundle must give them.
        threads: for decoding, and for the model on a CPU; None for one for each core this process may use.
        expected: number of images to come, if it is known: few are decoded by Pillow, and on a device that is
            not named predicted on the CPU.
    Attributes:
        bundle: the verified bundle.
        backend: the loaded model.
        runs_on: what computes, and why that was chosen.
        load_s: seconds that loading the model took.
    Raises:
        UserError: no such bundle, a value out of range, or what was asked for is not available here.
        CorruptFileError: a bundle that was changed.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle | None = None,
        *,
        backend: BackendName = "auto",
        device: DeviceName = "auto",
        decoder: DecoderName = "auto",
        top: int | None = None,
        batch_size: int = DEFAULT_BATCH,
        min_probability: float = 0.0,
        ten_crop: bool = False,
        features: FeatureLayer | None = None,
        threads: int | None = None,
        expected: int | None = None,
    ) -> None:
        if not isinstance(bundle, Bundle):
            bundle = open_bundle(None if bundle is None else Path(bundle))
        if not 0 <= min_probability <= 1:
            raise UserError(f"--min-probability {min_probability}: 0 to 1")
        self.bundle = bundle
        self.top, self._names = check_top(bundle, top), names_of(bundle)
        if features is not None:
            check_features(bundle, features)
        self._batch_size = fit_batch(batch_size, bundle.manifest.max_batch)
        self._min_probability, self._ten_crop, self._threads = min_probability, ten_crop, threads
        self._features = features is not None
        started = time.perf_counter()
        num_views = None if expected is None else expected * (NUM_VIEWS if ten_crop else 1)
        self.backend, self.runs_on = choose_backend(
            bundle, backend=backend, device=device, threads=threads or 0, expected=num_views
        )
        self.load_s = time.perf_counter() - started
        self._open = ExitStack()
        self._open.callback(self.backend.close)
        self._decoder_name = choose_decoder(decoder, self.backend, expected)

    def __call__(self, inputs: Input | Iterable[Input]) -> Iterator[Row]:
        """A row for each input, in order, as batches finish; memory does not grow with their number.

        Args:
            inputs: one or many: paths of files, uint8 arrays (height, width, 3) in RGB or (height, width) in
                gray, Pillow images, or the result of `find_inputs`. What cannot be read is an error row.
        """
        with closing(self.rows(inputs)) as rows:
            for one in rows:
                yield one.row

    def rows(
        self,
        inputs: Input | Iterable[Input],
        *,
        keep_pixels: bool = False,
        class_at: Callable[[Path], int | None] | None = None,
    ) -> Generator[PredictionWithPixels, None, None]:
        """As a call; with `keep_pixels`, each row with what the model saw of its image.

        Pixels are valid until the next row is asked for. Of ten crops they are the one in the centre. With
        `class_at`, which gives the true class of a path or None, rows have their truth.
        """
        with closing(self.decode(inputs)) as batches:
            for batch in batches:
                pixels = self._seen_pixels(batch) if keep_pixels else [None] * len(batch)
                for row, seen in zip(self._rows_of(batch, class_at), pixels, strict=True):
                    yield PredictionWithPixels(row, seen if isinstance(row, OkRow) else None)

    def _rows_of(self, batch: Batch, class_at: Callable[[Path], int | None] | None) -> Iterator[Row]:
        r"""Run the model on a batch, and give a row for each of its images, in order.

        A path that is not UTF-8 is shown with `\xNN` for its odd bytes, so that a row is always valid JSON.
        """
        outputs = run_valid(self.backend, batch, self._batch_size, features=self._features)
        probabilities_NC, features_ND = outputs
        predicted = zip(top_k(probabilities_NC, self._names, self.top), probabilities_NC, strict=True)
        features, failures = None if features_ND is None else iter(features_ND), iter(batch.failures)
        for path, valid in zip(batch.paths, batch.valid, strict=True):
            if not valid:
                yield ErrorRow(path=printable(path), error=next(failures).reason)
                continue
            best, row_C = next(predicted)
            row = OkRow(
                path=printable(path),
                predictions=tuple(p for p in best if p.probability >= self._min_probability),
            )
            place = None if class_at is None else class_at(path)
            if place is not None:
                label = self._names.labels[place]
                row = replace(row, truth=Truth(class_id=place, label=label, rank=rank_of(row_C, place)))
            yield row if features is None else FeatureRow(**asdict(row), features=next(features))

    @property
    def row_shape(self) -> RowShape:
        """Properties that all rows share."""
        return RowShape(self.top, named=bool(self._names.in_data))

    def decode(self, inputs: Input | Iterable[Input]) -> Generator[Batch, None, None]:
        """The inputs as a call decodes them for the model, batch by batch. Close it when done."""
        return self._loader.predict(_items(inputs), micro_batch=self._batch_size, ten_crop=self._ten_crop)

    @cached_property
    def _loader(self) -> Loader:
        """Kept from the first image on until `close`: DALI's graphs take longer to build than an image."""
        preprocessing, size = self.bundle.manifest.preprocessing, self._batch_size
        decoder = open_decoder(preprocessing, size, self._decoder_name, self.backend, self._threads)
        return Loader(self._open.enter_context(decoder), preprocessing, faults=SilentFaultLog())

    def _seen_pixels(self, batch: Batch) -> Iterable[NDArray[np.uint8]]:
        pixels = host_pixels(batch)
        return pixels[:, CENTRE_VIEW] if self._ten_crop else pixels

    def close(self) -> None:
        """Free the decoder and the model; a second call does nothing."""
        self._open.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_features(bundle: Bundle, layer: FeatureLayer) -> None:
    """Raise unless a bundle gives the features of a layer.

    Raises:
        UserError: it gives none, or another layer's, or there is no such layer; names the command that helps.
    """
    if layer not in get_args(FeatureLayer):
        raise UserError(f"--features {layer}: {', '.join(get_args(FeatureLayer))}")
    given = bundle.manifest.feature_layer
    if given != layer:
        instead = f"features of {given} and not of {layer}" if given else "no features"
        raise UserError(
            f"{bundle.folder} gives {instead}: export it with `alexnet export --features {layer}`"
        )


def _items(inputs: Input | Iterable[Input]) -> Iterator[Item]:
    single = isinstance(inputs, (str, os.PathLike, ImageSource, np.ndarray, Image))
    for number, one in enumerate([inputs] if single else inputs):  # type: ignore[arg-type]
        if isinstance(one, ImageSource):
            yield one
        elif isinstance(one, (str, os.PathLike)):
            yield Path(one)
        elif isinstance(one, (np.ndarray, Image)):
            yield from_pixels(one, number)
        else:
            kind = type(one).__name__
            raise TypeError(f"input {number} is a {kind}: expected a path, a uint8 array or a Pillow image")
