"""The interface of a decoder of batches, and the choice of one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from data_pipeline.common.errors import UserError
from data_pipeline.decode.feed import Feed
from data_pipeline.decode.pillow import Decoded, PillowBackend
from data_pipeline.transforms.crop import CropParams
from data_pipeline.transforms.preprocessing import Preprocessing

log = logging.getLogger("data_pipeline")


class ImageBackend(Protocol):
    """Decodes batches of encoded files into batches of crops.

    Attributes:
        takes_feeds: whether it is a `FeedBackend`.
    """

    name: str
    device: str
    max_batch: int
    takes_feeds: bool

    def decode(self, encoded: Sequence[bytes | None], crops: CropParams) -> Decoded:
        """Decode up to `max_batch` files; one that fails leaves zeros and its reason, a None leaves zeros."""

    def close(self) -> None:
        """Release threads and memory."""


class FeedBackend(ImageBackend, Protocol):
    """A backend whose fast way decodes several batches at a time, each as a whole or not at all.

    Attributes:
        max_batch_bytes: bound on what the images of a feed may decode to; None for no bound.
    """

    @property
    def max_batch_bytes(self) -> int | None: ...

    def decode_fast(self, plan: Callable[[], Feed]) -> object | None:
        """The images of a batch; None if one of its files is refused, or is not what its feed says.

        Args:
            plan: makes the feed, perhaps in another thread.
        """

    def distrust_fast(self, explained: bool) -> None:
        """Learn of a batch that was refused, and whether a file was found to be the reason."""

    def log_pillow(self) -> None:
        """Log, once, that Pillow decodes some of the files."""


def make_backend(
    name: Literal["auto", "dali", "pillow"],
    *,
    device: Literal["cpu", "gpu"],
    device_id: int = 0,
    preprocessing: Preprocessing,
    max_batch: int,
    num_threads: int,
    deterministic: bool = False,
    max_decoded_bytes: int = 2_000_000_000,
) -> ImageBackend:
    """Make the backend that decodes.

    Args:
        name: "auto" is DALI where it is installed, else Pillow, with a log line.
        device: where DALI decodes. Pillow decodes on the CPU.
        device_id: which GPU.
        preprocessing: the contract.
        max_batch: most samples in one batch.
        num_threads: decoding threads.
        deterministic: whether a GPU decodes a file to the same bytes each time, without its hardware decoder.
        max_decoded_bytes: bound on the images that a GPU has decoded and not yet cropped.
    Returns:
        The backend; the caller closes it.
    Raises:
        UserError: DALI was asked for and is not installed, or Pillow on a GPU.
    """
    if name == "pillow" and device == "gpu":
        raise UserError("the pillow backend decodes on the CPU only: use the dali backend, or device cpu")
    if name != "pillow":
        try:
            from data_pipeline.decode.dali import DaliBackend
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("nvidia"):
                raise
            if name == "dali" or device == "gpu":
                raise UserError("DALI is not installed: pip install 'alexnet[train]'") from error
            log.info("DALI is not installed: Pillow decodes, on the CPU")
        else:
            return DaliBackend(
                device, device_id, preprocessing.crop_px, max_batch, num_threads,
                deterministic=deterministic, max_decoded_bytes=max_decoded_bytes,
            )  # fmt: skip
    return PillowBackend(num_threads, max_batch)
