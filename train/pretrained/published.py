"""torchvision's pretrained `alexnet`: where it is published, what its file must be, and its 1,000 classes."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from data_pipeline.common.files import place_in_cache
from data_pipeline.download.fetch import ADVICE, fetch

log = logging.getLogger("train")

WORD = "torchvision"
"""Names these weights where a file of weights may be named."""


@dataclass(frozen=True)
class PublishedFile:
    """A file of weights that is published at a fixed address.

    Attributes:
        url: the address; a mirror has a file of the same name.
        sha256: of the file.
        size_bytes: of the file.
    """

    url: str
    sha256: str
    size_bytes: int

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self.url.rsplit("/", 1)[-1]


# torchvision publishes the first eight digits of the hash, as part of the name. The others, and the size, are
# those that independent projects give which pin this very file; it was not downloaded for this constant.
TORCHVISION_FILE = PublishedFile(
    url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    sha256="7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    size_bytes=244_408_911,
)


def fetch_torchvision(mirror: str | None = None, *, advice: str = ADVICE) -> Path:
    """Fetch torchvision's weights into the user's cache, unless they are there, and verify them.

    The next call resumes an interrupted download.

    Args:
        mirror: address of a folder that holds the same file; its content is verified all the same.
        advice: what to do about a server that refuses, for the message.
    Returns:
        The file.
    Raises:
        UserError: a server that does not answer, or no place to keep the file.
        CorruptFileError: the file that arrived is not the published one.
        SaveError: a full disk.
    """
    file = TORCHVISION_FILE
    url = file.url if mirror is None else f"{mirror.rstrip('/')}/{file.name}"
    path = place_in_cache(f"weights/{file.name}", file.name)
    if not path.is_file():
        log.info("%s from %s", file.name, url)
    fetch(url, path, size_bytes=file.size_bytes, sha256=file.sha256, advice=advice)
    return path


@cache
def imagenet_classes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes of ILSVRC 2012 in the order of torchvision's logits: WordNet ids, and names for people.

    Source: torchvision's `AlexNet_Weights.IMAGENET1K_V1.meta["categories"]` (the names); the WordNet ids in
        ascending order, in which torchvision's ImageFolder numbered the classes.

    >>> ids, names = imagenet_classes()
    >>> len(ids), ids[:2], names[:2]
    (1000, ('n01440764', 'n01443537'), ('tench', 'goldfish'))
    """
    text = (resources.files("train.pretrained") / "imagenet.tsv").read_text(encoding="utf-8")
    ids, names = zip(*(line.split("\t") for line in text.splitlines()), strict=True)
    return ids, names


def published_classes(sha256: str) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """The classes of a file of weights by its hash, and their names for people; None for any other file's."""
    return imagenet_classes() if sha256 == TORCHVISION_FILE.sha256 else (None, ())
