"""Inputs to decoded batches, read ahead; the decoder of a prediction is kept from call to call."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import ExitStack
from pathlib import Path

from data_pipeline.loader import ImageSource, Loader
from data_pipeline.loading.bad_files import Failure, FaultLog
from data_pipeline.loading.prefetch import Batch, ImageBackend
from data_pipeline.transforms.preprocessing import Preprocessing
from infer.predict.decode import DecoderName, decoding_device, fit_batch, open_decoder
from infer.runtime.base import InferenceBackend


class Decoding:
    """Decodes for one model. It outlives a call, since DALI's graphs take longer to build than an image.

    Args:
        preprocessing: the contract.
        backend: the model that the images are for.
        name: who decodes.
        batch_size: images a batch; lowered, with a warning, to what the model takes.
        ten_crop: the paper's ten views of each image.
        threads: decoding threads; None for one for each core that this process may use.
    Raises:
        UserError: `batch_size` below 1.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        backend: InferenceBackend,
        *,
        name: DecoderName,
        batch_size: int,
        ten_crop: bool,
        threads: int | None = None,
    ) -> None:
        self.size = fit_batch(batch_size, backend.max_batch)
        self._preprocessing, self._ten_crop = preprocessing, ten_crop
        self._name, self._device, self._threads = name, decoding_device(backend, name), threads
        self._open = ExitStack()
        self._decoder: ImageBackend | None = None

    def batches(self, inputs: Iterable[Path | ImageSource]) -> Generator[Batch, None, None]:
        """The inputs decoded, in order; they are consumed as batches are read ahead. Close it when done."""
        if self._decoder is None:
            self._decoder = self._open.enter_context(
                open_decoder(self._preprocessing, self.size, self._name, self._device, self._threads)
            )
        loader = Loader(self._decoder, self._preprocessing, faults=_RowsTellThem())
        return loader.predict(inputs, micro_batch=self.size, ten_crop=self._ten_crop)

    def close(self) -> None:
        """Free the decoder; a later call opens another."""
        self._open.close()
        self._decoder = None


class _RowsTellThem(FaultLog):
    """Says and keeps nothing: in prediction every bad file has its own row."""

    def add(self, failure: Failure) -> None:
        pass

    def exclude(self, path: os.PathLike[str], reason: str) -> None:
        pass
