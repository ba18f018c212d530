"""Lists images: an ImageFolder split with its classes, or the images below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.common.errors import UserError, raising
from data_pipeline.common.files import IMAGE_SUFFIXES, LOOKED_FOR, read_head
from data_pipeline.common.image_kind import is_image_head
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.common.passed_over import PassedOver
from data_pipeline.common.text import composed, printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.index_cache import Watch

LAYOUT = "expected <data>/train/<class>/*.jpg and <data>/val/<class>/*.jpg"


JUNK = frozenset(
    {
        "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "@eadir", "$recycle.bin",
        "system volume information", "lost+found",
    }
)  # fmt: skip
"""Names that operating systems leave in folders, in lower case: neither classes nor images."""


def load_image_folder(
    root: Path, split: str, watch: Watch | None = None, folder_name: str | None = None
) -> Dataset:
    """Index `root/split/<class>/**`; hidden files are skipped, and files that are no images are counted.

    Args:
        root: the data folder.
        split: "train", "val", ...
        watch: records each folder before it is listed.
        folder_name: of the split's folder; None if it is named as the split.
    Returns:
        The samples, sorted.
    Raises:
        UserError: no folder that can be listed, no class folders, a class without images, or fewer than two
            classes.
    """
    folder = Path(root) / (folder_name or split)
    if watch is not None:
        watch.note(folder)
    entries = list_entries(folder)
    classes = class_folders(folder, entries)
    if not classes:
        flat = any(map(is_image, entries))
        what = "its images lie side by side, not in class folders" if flat else "it holds no class folders"
        raise UserError(f"cannot learn from {printable(folder)}: {what}; {LAYOUT}")

    passed_over = PassedOver()
    for entry in entries:
        if not is_folder(entry):
            passed_over.add_loose(entry.name, is_image(entry))
    paths: list[PackedStrings] = []
    for name in classes:
        own = PassedOver()
        found = sorted(_walk(folder / name, name, watch=watch, passed_over=own), key=os.fsencode)
        if not found:
            raise UserError(
                f"class folder {printable(folder / name)} holds no images"
                f"{f', but {own.sentence()}' * bool(own)}: "
                f"add some ({LOOKED_FOR}) or remove the folder"
            )
        paths.append(PackedStrings.pack(found))
        passed_over.merge(own)
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
        folder_name=folder_name or split,
        passed_over=passed_over,
    )


def class_folders(folder: Path, entries: Sequence[os.DirEntry[str]]) -> tuple[str, ...]:
    """The names of the class folders among the entries of a split's folder.

    Raises:
        UserError: two are one name in two Unicode normalisations, as where macOS and Linux each copied some.
    """
    classes = tuple(entry.name for entry in entries if is_folder(entry))
    seen: dict[str, str] = {}
    for name in classes:
        if (first := seen.setdefault(composed(name), name)) != name:
            raise UserError(
                f"two class folders of {printable(folder)} are both named {printable(composed(name))!r}, in "
                f"two Unicode normalisations ({os.fsencode(first)!r} and {os.fsencode(name)!r}): merge them"
            )
    return classes


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one. A link in a circle is not: reading it fails."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_image(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is taken for an image: by its suffix or, where it has none, by its first bytes."""
    suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122 - half the cost, for millions
    return suffix in IMAGE_SUFFIXES or (not suffix and is_image_head(read_head(entry.path)))


def list_entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """List a folder in byte order, without hidden entries and what operating systems leave.

    Raises:
        UserError: it cannot be listed.
    """
    with raising(UserError, f"cannot list {printable(folder)}"), os.scandir(folder) as entries:
        visible = [
            entry for entry in entries if not entry.name.startswith(".") and entry.name.lower() not in JUNK
        ]
    return sorted(visible, key=lambda entry: os.fsencode(entry.name))


def walk_images(
    folder: str | os.PathLike[str], recursive: bool = True, passed_over: PassedOver | None = None
) -> Iterator[str]:
    """List the image files below a folder, relative to it, in byte order.

    Args:
        folder: where to look.
        recursive: whether to enter folders inside it.
        passed_over: counts the files that are no images.
    Raises:
        UserError: a folder that cannot be listed.
    """
    return _walk(folder, "", recursive, passed_over=passed_over)


def _walk(
    folder: str | os.PathLike[str],
    prefix: str,
    recursive: bool = True,
    parents: frozenset[tuple[int, int]] = frozenset(),
    watch: Watch | None = None,
    passed_over: PassedOver | None = None,
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
        if is_folder(entry):
            if recursive:
                yield from _walk(entry.path, name, recursive, parents | {identity}, watch, passed_over)
        elif is_image(entry):
            yield name
        elif passed_over is not None:
            passed_over.add(entry.name)
