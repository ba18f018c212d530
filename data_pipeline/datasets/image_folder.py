"""Lists images: an ImageFolder split with its classes, or the images below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import IMAGE_SUFFIXES
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.watch import Watch

LAYOUT = "expected <data>/train/<class>/*.jpg and <data>/val/<class>/*.jpg"


def load_image_folder(root: Path, split: str, watch: Watch | None = None) -> Dataset:
    """Index `root/split/<class>/**`; hidden files, and files without an image's suffix, are skipped.

    Args:
        root: the data folder.
        split: "train", "val", ...
        watch: records each folder before it is listed.
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

    paths: list[PackedStrings] = []
    for name in classes:
        found = sorted(_walk(folder / name, name, watch=watch), key=os.fsencode)
        if not found:
            raise UserError(
                f"class folder {printable(folder / name)} holds no images: "
                f"add some ({', '.join(sorted(IMAGE_SUFFIXES))}) or remove the folder"
            )
        paths.append(PackedStrings.pack(found))
    if len(classes) == 1:
        raise UserError(
            f"{printable(folder)} holds one class only ({printable(classes[0])}), and no file says which "
            "image is of which class: there is nothing to tell apart; add a folder for each class"
        )
    return Dataset(
        root=Path(root),
        split=split,
        paths=PackedStrings.join(paths),
        labels=np.repeat(np.arange(len(classes), dtype=np.int64), [len(names) for names in paths]),
        classes=classes,
    )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one. A link in a circle is not: reading it fails."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_image(name: str) -> bool:
    """Whether a file has an image's suffix, and is not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith(".")  # noqa: PTH122


def list_entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """List a folder, without hidden entries, in byte order.

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
    """List the image files below a folder, relative to it, in byte order.

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
    """List image files below `folder`, as `prefix/...`. A link back to a folder around it is not entered."""
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
