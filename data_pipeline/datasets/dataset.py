"""A `Dataset` is one split of labelled images: where each sample is, its class, and how to read its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import MAX_FILE_BYTES, read_file
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.common.passed_over import PassedOver
from data_pipeline.common.text import composed, printable
from data_pipeline.datasets.sample_table import SampleTable
from data_pipeline.shards.shard_reader import ShardReader


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """Identifies the samples of a split: two splits whose contents are equal give the same stream.

    Attributes:
        num_samples: how many.
        num_quarantined: how many more the exclude list names.
        sha256: of their names, classes and order. Files and the shards made from them have the same.
    """

    num_samples: int
    num_quarantined: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of labelled images. Sample `i` is the same image on every machine that has the same data.

    Attributes:
        root: the data folder.
        split: the split's name, such as "train".
        paths: (N) original names relative to its folder, by class and then by name, both in byte order.
        labels: (N) int64, the place of each sample's class in `classes`.
        classes: class names as the data has them (WordNet ids in ImageNet), in byte order.
        labels_text: (len(classes)) names for people to read; empty where the data has none.
        num_quarantined: samples that the exclude list left out.
        reader: reads the samples of tar shards; None where each is a file, `root/folder_name/path`.
        table: what is known of each image before it is read; None where nobody has looked yet.
        folder_name: of the split's folder; as the split itself where it is empty.
        passed_over: the files beside the samples that are not read.
    """

    root: Path
    split: str
    paths: Sequence[str]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    labels_text: tuple[str, ...] = ()
    num_quarantined: int = 0
    reader: ShardReader | None = None
    table: SampleTable | None = None
    folder_name: str = ""
    passed_over: PassedOver = field(default_factory=PassedOver)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def folder(self) -> str:
        """The name of the split's folder."""
        return self.folder_name or self.split

    @property
    def class_labels(self) -> tuple[str, ...]:
        """The names of the classes for people to read: `labels_text` where there are any, else `classes`."""
        return self.labels_text or self.classes

    def name_at(self, index: int) -> str:
        """The name of one sample, relative to the data folder: its file, or its shard and member."""
        return f"{self.folder}/{self.paths[index]}" if self.reader is None else self.reader.name_at(index)

    def path_at(self, index: int) -> Path:
        """The path of one sample, for messages."""
        return self.root / self.name_at(index)

    def read(self, index: int, max_bytes: int = MAX_FILE_BYTES) -> bytes:
        """Read the encoded image of one sample. Threads may read at the same time.

        Raises:
            ImageError: it cannot be read, is empty, or is larger than `max_bytes`.
        """
        if self.reader is not None:
            return self.reader.read(index, max_bytes)
        return read_file(f"{self.root}/{self.folder}/{self.paths[index]}", max_bytes)

    def contents(self) -> Contents:
        """Hash the names, classes and order of the samples: 0.1 s for a million. No file is read."""
        names, classes = PackedStrings.pack(self.paths), PackedStrings.pack(self.classes)
        digest = hashlib.sha256()
        for part in (classes.ends, classes.blob, names.ends, names.blob, self.labels):
            content = part if isinstance(part, bytes) else part.astype("<i8", copy=False).tobytes()
            digest.update(len(content).to_bytes(8, "little"))  # not joined: that would copy all names
            digest.update(content)
        return Contents(
            num_samples=len(self), num_quarantined=self.num_quarantined, sha256=digest.hexdigest()
        )

    def take(self, indices: npt.NDArray[np.int64]) -> Dataset:
        """Make a dataset of some of the samples, in the order given."""
        return replace(
            self,
            paths=PackedStrings.pack(self.paths).take(indices),
            labels=self.labels[indices],
            reader=None if self.reader is None else self.reader.take(indices),
            table=None if self.table is None else self.table.take(indices),
        )


def check_same_classes(train: Dataset, val: Dataset) -> None:
    """Refuse two splits whose class folders differ: a label would not mean the same class in both.

    Raises:
        UserError: naming the first few classes that only one of them has.
    """
    if train.classes == val.classes:
        return
    only = []
    for one, other in ((train, val), (val, train)):
        known = set(map(composed, other.classes))
        extra = [printable(name) for name in one.classes if composed(name) not in known]
        if extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            only.append(f"only in {one.split}: {', '.join(extra[:3])}{more}")
    if not only:
        only.append("in Unicode normalisation: NFC here, NFD there")
    raise UserError(
        f"the class folders of {train.split} and {val.split} in {printable(train.root)} differ "
        f"({'; '.join(only)}): give both splits the same class folders"
    )
