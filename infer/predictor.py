"""Prediction from Python: load a bundle once, give it images, get rows.

    from infer import Predictor, find_inputs

    with Predictor("runs/demo-20260101T000000Z/export/onnx-fp32") as predictor:
        for row in predictor(["cat.jpg", array, pillow_image]):
            print(row.path, row.status)
        rows = list(predictor(find_inputs(["images/"])))

The command line is built on it.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.loader import ImageSource
from data_pipeline.loading.prefetch import Batch
from infer.bundle.load import Bundle, open_bundle
from infer.predict.decode import DecoderName, quick_decoder
from infer.predict.decoding import Decoding
from infer.predict.rows import DEFAULT_BATCH, Item, Row, RowMaker, SeenRow, check_top
from infer.runtime.choose import BackendName, DeviceName, choose_backend

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

    Input = str | os.PathLike[str] | ImageSource | NDArray[np.uint8] | Image


class Predictor:
    """A loaded model; one thread at a time.

    Args:
        bundle: the exported folder; None for the newest export under runs/; or one that is verified already.
        backend: `onnx`, `trt`, or `auto`: the engine where it can run, else ONNX Runtime.
        device: `cpu`, `cuda`, or `auto`.
        decoder: `dali`, `pillow`, or `auto`: DALI where it is installed.
        top: classes a row; None for five, or all where the model has fewer.
        batch_size: images a batch.
        min_probability: classes below are left out of a row.
        ten_crop: average the softmax of the paper's ten views of each image.
        threads: for decoding, and for the model on a CPU; None for one for each core this process may use.
        expected: how many images there will be, if that is known: see `infer.predict.decode.quick_decoder`.
    Raises:
        UserError: no such bundle, or what was asked for cannot be had here.
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
        threads: int | None = None,
        expected: int | None = None,
    ) -> None:
        if not isinstance(bundle, Bundle):
            bundle = open_bundle(None if bundle is None else Path(bundle))
        self.bundle = bundle
        check_top(self.bundle, top)
        choice = choose_backend(self.bundle, backend=backend, device=device, threads=threads or 0)
        self.backend = choice.backend
        self.runs_on = choice.sentence
        try:
            self._make = RowMaker(
                self.bundle, self.backend, top=top, min_probability=min_probability, ten_crop=ten_crop
            )
            self._decoding = Decoding(
                self.bundle.manifest.preprocessing,
                self.backend,
                name=quick_decoder(decoder, self.backend, expected),
                batch_size=batch_size,
                ten_crop=ten_crop,
                threads=threads,
            )
        except BaseException:
            self.backend.close()
            raise
        self.top = self._make.top

    def __call__(self, inputs: Input | Iterable[Input]) -> Iterator[Row]:
        """A row for each input, in order, as batches finish.

        Args:
            inputs: one or many: paths of files, uint8 arrays (height, width, 3) in RGB or (height, width) in
                gray, Pillow images, or what `find_inputs` found. What cannot be read is an error row.
        """
        return self._make.rows(_items(inputs), self._decoding)

    def seen(self, inputs: Input | Iterable[Input]) -> Iterator[SeenRow]:
        """As a call, with the pixels that the model saw, which are good until the next row is asked for."""
        return self._make.seen(_items(inputs), self._decoding)

    def decode(self, inputs: Input | Iterable[Input]) -> Generator[Batch, None, None]:
        """The inputs as a call decodes them for the model, batch by batch. Close it when done."""
        return self._decoding.batches(_items(inputs))

    def close(self) -> None:
        """Free the decoder and the model; a second call does nothing."""
        self._decoding.close()
        self.backend.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _items(inputs: Input | Iterable[Input]) -> Iterator[Item]:
    from PIL.Image import Image

    single = isinstance(inputs, (str, os.PathLike, ImageSource, np.ndarray, Image))
    for number, one in enumerate([inputs] if single else inputs):  # type: ignore[arg-type]
        yield _item(one, number)


def _item(one: object, number: int) -> Item:
    from PIL.Image import Image

    from infer.predict.pixels import from_array, from_image

    if isinstance(one, ImageSource):
        return one
    if isinstance(one, (str, os.PathLike)):
        return Path(one)
    if isinstance(one, np.ndarray):
        return from_array(one, number)
    if isinstance(one, Image):
        return from_image(one, number)
    kind = type(one).__name__
    raise TypeError(f"input {number} is a {kind}: expected a path, a uint8 array or a Pillow image")
