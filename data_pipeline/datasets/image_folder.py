"""What there is to read: an ImageFolder split with its classes, or the images below a folder."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.packed_strings import PackedNames
from data_pipeline.datasets.watch import Watch
from data_pipeline.loading.bad_files import ImageError, printable

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})
LAYOUT = "expected <data>/train/<class>/*.jpg and <data>/val/<class>/*.jpg"


MAX_FILE_BYTES = 800_000_000
"""The largest file that is read where nobody sets another limit."""


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


class Source(Protocol):
    """Where samples that are no files of their own come from. Threads may read at the same time."""

    def read(self, index: int, max_bytes: int) -> bytes:
        """The bytes of one sample; see `Dataset.read`."""

    def name_at(self, index: int) -> str:
        """Where one sample is, relative to the data folder."""

    def take(self, indices: npt.NDArray[np.int64]) -> Source:
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
    source: Source | None = None

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
        names = self.paths if isinstance(self.paths, PackedNames) else PackedNames.pack(self.paths)
        classes = PackedNames.pack(self.classes)
        digest = hashlib.sha256()
        for part in (classes.ends, classes.blob, names.ends, names.blob, self.labels):
            content = part if isinstance(part, bytes) else part.astype("<i8").tobytes()
            digest.update(len(content).to_bytes(8, "little") + content)
        return Contents(
            num_samples=len(self), num_quarantined=self.num_quarantined, sha256=digest.hexdigest()
        )

    def take(self, indices: npt.NDArray[np.int64]) -> Dataset:
        """Some of the samples, in the order given."""
        paths = self.paths if isinstance(self.paths, PackedNames) else PackedNames.pack(self.paths)
        return replace(
            self,
            paths=paths.take(indices),
            labels=self.labels[indices],
            source=None if self.source is None else self.source.take(indices),
        )


def load_image_folder(root: Path, split: str, watch: Watch | None = None) -> Dataset:
    """Index `root/split/<class>/**`; hidden files, and files without an image's suffix, are passed over.

    Args:
        root: the data folder.
        split: "train", "val", ...
        watch: told of each folder before it is listed.
    Returns:
        The samples, sorted.
    Raises:
        UserError: no such folder, no class folders, a class without images, or fewer than two classes.
    """
    folder = Path(root) / split
    if not Path(root).is_dir():
        raise UserError(f"no data folder {printable(root)}: {LAYOUT}")
    if not folder.is_dir():
        raise UserError(f"no folder {printable(split)!r} in {printable(root)}: {LAYOUT}")
    if watch is not None:
        watch.note(folder)
    entries = list_entries(folder)
    classes = tuple(entry.name for entry in entries if entry.is_dir())
    if not classes:
        flat = any(is_image(entry.name) for entry in entries)
        what = "its images lie side by side, not in class folders" if flat else "it holds no class folders"
        raise UserError(f"cannot learn from {printable(folder)}: {what}; {LAYOUT}")

    paths: list[PackedNames] = []
    counts: list[int] = []
    for name in classes:
        found = sorted(_walk(folder / name, name, watch=watch), key=os.fsencode)
        if not found:
            raise UserError(
                f"class folder {printable(folder / name)} holds no images: "
                f"add some ({', '.join(sorted(IMAGE_SUFFIXES))}) or remove the folder"
            )
        paths.append(PackedNames.pack(found))
        counts.append(len(found))
    if len(classes) == 1:
        raise UserError(
            f"{printable(folder)} holds one class only ({printable(classes[0])}), and no file says which "
            "image is of which class: there is nothing to tell apart; add a folder for each class"
        )
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    labels.setflags(write=False)
    return Dataset(
        root=Path(root), split=split, paths=PackedNames.join(paths), labels=labels, classes=classes
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


def read_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """All bytes of one regular file.

    Args:
        path: the file.
        max_bytes: a larger file is refused before it is read.
    Raises:
        ImageError: missing, unreadable, not a regular file (a pipe would wait for ever), empty, or too large.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("not a regular file")
        if status.st_size > max_bytes:
            raise ImageError(f"file of {status.st_size} bytes is above the limit of {max_bytes}")
        with open(path, "rb") as file:  # noqa: PTH123 - half the cost of Path.open for small files
            data = file.read()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the path, which no file system has
        raise ImageError(f"cannot be read: {error}") from error
    if not data:
        raise ImageError("empty file")
    return data


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link in a circle is not, and fails when it is read."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image, and not a hidden one."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")  # noqa: PTH122


def list_entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What a folder holds, hidden entries left out, in byte order.

    Raises:
        UserError: it cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"cannot list {printable(folder)}: {error.strerror or error}") from error
    return sorted(visible, key=lambda entry: os.fsencode(entry.name))


def walk_images(folder: str | os.PathLike[str], recursive: bool = True) -> Iterator[str]:
    """Names of the image files below a folder, relative to it, in byte order.

    Args:
        folder: where to look.
        recursive: whether to enter folders inside it.
    Raises:
        UserError: a folder that cannot be listed.
    """
    return _walk(folder, "", recursive)


def _walk(
    folder: str | os.PathLike[str],
    prefix: str,
    recursive: bool = True,
    parents: frozenset[tuple[int, int]] = frozenset(),
    watch: Watch | None = None,
) -> Iterator[str]:
    """Image files below `folder`, as `prefix/...`. A link back to a folder that we are in is not entered."""
    status = Path(folder).stat()
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        return
    if watch is not None:
        watch.note(folder)
    for entry in list_entries(folder):
        name = f"{prefix}/{entry.name}" if prefix else entry.name
        if _is_folder(entry):
            if recursive:
                yield from _walk(entry.path, name, recursive, parents | {identity}, watch)
        elif is_image(entry.name):
            yield name
