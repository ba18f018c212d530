"""One split of labelled images: where each sample is, its class, and how to read its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import MAX_FILE_BYTES, read_file
from data_pipeline.common.text import printable
from data_pipeline.datasets.packed_strings import PackedStrings


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """Which samples a split holds; two that are equal give the same stream.

    Args:
        num_samples: how many.
        num_quarantined: how many more the quarantine list left out.
        sha256: of their names, classes and order. Files and the shards made from them have the same.
    """

    num_samples: int
    num_quarantined: int
    sha256: str


class SampleReader(Protocol):
    """Where samples that are no files of their own come from. Threads may read at the same time."""

    def read(self, index: int, max_bytes: int) -> bytes:
        """The bytes of one sample; see `Dataset.read`."""

    def name_at(self, index: int) -> str:
        """Where one sample is, relative to the data folder."""

    def take(self, indices: npt.NDArray[np.int64]) -> SampleReader:
        """The source of some of the samples."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of labelled images. Sample `i` is the same image on every machine that has the same data.

    Args:
        root: the data folder.
        split: the split's name, such as "train".
        paths: (N) original names relative to `root/split`, by class and then by name, both in byte order.
        labels: (N) int64, the place of each sample's class in `classes`.
        classes: class names as the data has them (WordNet ids in ImageNet), in byte order.
        labels_text: (len(classes)) names for people to read; empty where the data has none.
        num_quarantined: samples that the quarantine list left out.
        source: where the bytes are; None for a file `root/split/path` each.
    """

    root: Path
    split: str
    paths: Sequence[str]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    labels_text: tuple[str, ...] = ()
    num_quarantined: int = 0
    source: SampleReader | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def class_labels(self) -> tuple[str, ...]:
        """The names of the classes for people to read: `labels_text` where there are any, else `classes`."""
        return self.labels_text or self.classes

    def name_at(self, index: int) -> str:
        """Where one sample is, relative to the data folder: its file, or its shard and the member in it."""
        return f"{self.split}/{self.paths[index]}" if self.source is None else self.source.name_at(index)

    def path_at(self, index: int) -> Path:
        """Where one sample is, for messages."""
        return self.root / self.name_at(index)

    def read(self, index: int, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """The encoded image of one sample. Threads may read at the same time.

        Raises:
            ImageError: it cannot be read, is empty, or is larger than `max_bytes`.
        """
        if self.source is not None:
            return self.source.read(index, max_bytes)
        return read_file(f"{self.root}/{self.split}/{self.paths[index]}", max_bytes)

    def contents(self) -> Contents:
        """What tells this split from another one; 0.1 s for a million samples. No file is read."""
        names = self.paths if isinstance(self.paths, PackedStrings) else PackedStrings.pack(self.paths)
        classes = PackedStrings.pack(self.classes)
        digest = hashlib.sha256()
        for part in (classes.ends, classes.blob, names.ends, names.blob, self.labels):
            content = part if isinstance(part, bytes) else part.astype("<i8").tobytes()
            digest.update(len(content).to_bytes(8, "little") + content)
        return Contents(
            num_samples=len(self), num_quarantined=self.num_quarantined, sha256=digest.hexdigest()
        )

    def take(self, indices: npt.NDArray[np.int64]) -> Dataset:
        """Some of the samples, in the order given."""
        paths = self.paths if isinstance(self.paths, PackedStrings) else PackedStrings.pack(self.paths)
        return replace(
            self,
            paths=paths.take(indices),
            labels=self.labels[indices],
            source=None if self.source is None else self.source.take(indices),
        )


def check_same_classes(train: Dataset, val: Dataset) -> None:
    """Refuse two splits whose class folders differ: labels would not mean the same, and accuracy nothing.

    Raises:
        UserError: naming the first few classes that only one of them has.
    """
    if train.classes == val.classes:
        return
    only = []
    for one, other in ((train, val), (val, train)):
        extra = [printable(name) for name in one.classes if name not in set(other.classes)]
        if extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            only.append(f"only in {one.split}: {', '.join(extra[:3])}{more}")
    raise UserError(
        f"the class folders of {train.split} and {val.split} in {printable(train.root)} differ "
        f"({'; '.join(only)}): give both splits the same class folders"
    )
