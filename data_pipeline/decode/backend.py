"""What a decoder of batches is, for those that use one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from data_pipeline.decode.feed import Feed
from data_pipeline.decode.pillow import Decoded
from data_pipeline.transforms.crop import CropParams


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
