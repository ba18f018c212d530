"""Opens a dataset in any of its layouts: class folders, Tiny ImageNet, ImageNet, or tar shards.

| layout | train | val | detected by |
|---|---|---|---|
| ImageFolder | `train/<class>/**` | `val/<class>/**` | class folders with images |
| Tiny ImageNet | `train/<synset id>/images/*` | `val/images/*` flat | `val/val_annotations.txt` |
| ImageNet | `train/<synset id>/*` | `val/*` flat | `val.txt`, `LOC_val_solution.csv`, or the devkit |
| tar shards | `train/*.tar` | `val/*.tar` | tar files in the split's folder |

Data that could only give chance accuracy is refused: flat images without labels, splits of different classes.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline.common.errors import UserError
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.common.passed_over import PassedOver
from data_pipeline.common.text import printable, spelled_as
from data_pipeline.datasets.dataset import Dataset, check_same_classes
from data_pipeline.datasets.exclude_list import exclude_listed, find_exclude_list
from data_pipeline.datasets.image_folder import (
    LAYOUT,
    class_folders,
    is_folder,
    is_image,
    list_entries,
    load_image_folder,
)
from data_pipeline.datasets.index_cache import Watch, load_index, save_index
from data_pipeline.datasets.label_files import (
    LABEL_FILES,
    find_label_file,
    read_class_names,
    read_synset_ids,
)
from data_pipeline.datasets.sharded import open_shards
from data_pipeline.datasets.splits import (
    SPLITS,
    find_split_folder,
    no_split,
    refuse_compressed_shards,
    shards_of,
    split_named,
)
from data_pipeline.datasets.table_cache import load_table

log = logging.getLogger("data_pipeline")

MIN_CACHED = 10_000
"""Datasets with fewer files are listed anew each time: that takes a moment, and leaves no file behind."""


def open_dataset(
    root: Path, split: str, *, quarantine: Path | bool = True, min_cached: int = MIN_CACHED
) -> Dataset:
    """Open one split of the data in a folder, whatever its layout.

    Args:
        root: the data folder.
        split: "train", "val", ...; or another name of its folder, such as "valid".
        quarantine: True excludes what `quarantine.jsonl` of the data folder names, or the newer one that is
            kept of it in the user's cache, where there is one; a path is another list; False excludes
            nothing.
        min_cached: from how many samples on the index and the sample table are kept for the next time.
    Returns:
        The samples, by class and then by name, without those that the list names.
    Raises:
        UserError: no such folder, no images, or a layout from which nothing could be learned.
        CorruptFileError: shards, or their indices, that are damaged.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no data folder {printable(root)}: {LAYOUT}")
    if split in ("", ".", "..") or "/" in split:
        raise UserError(f"{split!r} is not the name of a split: train, val, ...")
    split = split_named(split)
    folder = find_split_folder(root, split)
    refuse_compressed_shards(root, split, folder)
    if shards := shards_of(root, split, folder):
        dataset = replace(open_shards(root, split, shards), folder_name=folder or split)
    elif folder is None:
        raise no_split(root, split)
    else:
        found = load_index(root, split, folder)
        dataset = _scan(root, split, folder, min_cached) if found is None else found
    dataset.labels.setflags(write=False)
    if dataset.table is None and len(dataset) >= min_cached:
        dataset = replace(dataset, table=load_table(dataset))
    listed = find_exclude_list(root, quarantine)
    return dataset if listed is None else exclude_listed(dataset, listed)


def open_recorded(
    root: Path, split: str, option: str = "--data", *, quarantine: Path | bool = True
) -> Dataset:
    """Open a split in a place that nobody named now: a recipe, a run or a checkpoint has it from earlier.

    Args:
        root, split, quarantine: as in `open_dataset`.
        option: names another place, for the message.
    Raises:
        UserError, CorruptFileError: as in `open_dataset`; with the option, where the data is gone.
    """
    try:
        return open_dataset(root, split, quarantine=quarantine)
    except UserError as error:
        if (Path(root) / split).is_dir():
            raise
        raise UserError(f"{error}; if the data is elsewhere now, name it with {option} DIR") from error


def splits_of(root: Path) -> tuple[str, ...]:
    """The splits of a data folder that have labels, of train, val and test; ImageNet's test images have none.

    Raises:
        UserError: no such folder, or neither train nor val in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no data folder {printable(root)}: {LAYOUT}")
    found = []
    for split in SPLITS:
        folder = find_split_folder(root, split)
        has_shards = bool(shards_of(root, split, folder))
        labelled = split != "test" or has_shards or not (folder and _is_flat(root / folder))
        if labelled and (folder is not None or has_shards):
            found.append(split)
    if not set(found) & {"train", "val"}:
        raise UserError(f"neither train nor val in {printable(root)}: {LAYOUT}")
    return tuple(found)


def _scan(root: Path, split: str, folder_name: str, min_cached: int) -> Dataset:
    watch = Watch(root)
    if _is_flat(root / folder_name):
        dataset = _load_flat(root, split, folder_name, watch)
    else:
        dataset = load_image_folder(root, split, watch, folder_name)
        if split != "train" and (classes := _train_classes(root, watch)) is not None:
            dataset = _with_spelling(dataset, classes)
            check_same_classes(replace(dataset, split="train", classes=classes), dataset)
    dataset = replace(dataset, labels_text=read_class_names(root, dataset.classes, watch))
    if len(dataset) >= min_cached:
        save_index(dataset, watch)
    return dataset


def _with_spelling(dataset: Dataset, classes: tuple[str, ...]) -> Dataset:
    """Give a split the class names of the training split, where only their Unicode normalisation differs."""
    spelled = spelled_as(dataset.classes, classes)
    if tuple(spelled) == dataset.classes or set(spelled) != set(classes):
        return dataset
    count = sum(1 for one, other in zip(spelled, dataset.classes, strict=True) if one != other)
    log.info(
        "%s: names of class folders differ from those of train in Unicode normalisation alone (NFC, NFD), %d "
        "of them: matched",
        dataset.split, count,
    )  # fmt: skip
    numbers = np.array([classes.index(name) for name in spelled], dtype=np.int64)[dataset.labels]
    return replace(dataset, labels=numbers, classes=classes).take(np.argsort(numbers, kind="stable"))


def _is_flat(folder: Path) -> bool:
    """Whether images lie side by side: in the split's folder, or in `images/` as its only folder."""
    entries = list_entries(folder)
    folders = [entry.name for entry in entries if is_folder(entry)]
    return folders == ["images"] or (not folders and any(map(is_image, entries)))


def _train_classes(root: Path, watch: Watch) -> tuple[str, ...] | None:
    """The class folders of the training split; None where there is no such split, or it is not in folders."""
    folder = root / (find_split_folder(root, "train") or "train")
    watch.note(folder)
    if not folder.is_dir():
        return None
    return class_folders(folder, list_entries(folder)) or None


def _load_flat(root: Path, split: str, folder_name: str, watch: Watch) -> Dataset:
    """Load a split whose images lie side by side, with their classes in a label file."""
    folder = root / folder_name
    found = find_label_file(root, split, folder_name, watch)
    if found is None:
        raise UserError(
            f"the images of {printable(folder)} lie side by side, not in class folders, and no file says "
            f"which is of which class, so accuracy would be chance: {LAYOUT}, or add {LABEL_FILES}"
        )
    path, read_labels = found
    inner = "images/" if (folder / "images").is_dir() else ""
    watch.note(folder)
    watch.note(folder / inner)
    names, passed_over = _list_flat(folder, inner, path)
    train_classes, synset_ids = _train_classes(root, watch), read_synset_ids(root, watch)
    if synset_ids is not None and train_classes is not None:
        synset_ids = tuple(sorted(spelled_as(synset_ids, train_classes), key=os.fsencode))
    if train_classes is not None and synset_ids is not None and train_classes != synset_ids:
        missing = sorted(set(synset_ids) ^ set(train_classes))
        raise UserError(
            f"the class folders of {printable(root / 'train')} are not those of wnids.txt "
            f"({len(train_classes)} and {len(synset_ids)}, first difference {printable(missing[0])}): "
            "the data is incomplete"
        )
    classes = train_classes or synset_ids
    labels = read_labels(path, names, classes, watch)
    labels = dict(zip(spelled_as(labels, names), spelled_as(labels.values(), classes or ()), strict=True))
    if classes is None:
        classes = tuple(sorted(set(labels.values()), key=os.fsencode))
    _check_labels(path, names, labels, classes, folder / inner)
    place = {name: number for number, name in enumerate(classes)}
    numbers = np.array([place[labels[name]] for name in names], dtype=np.int64)
    order = np.argsort(numbers, kind="stable")
    return Dataset(
        root=root,
        split=split,
        paths=PackedStrings.pack(f"{inner}{names[i]}" for i in order),
        labels=numbers[order],
        classes=classes,
        folder_name=folder_name,
        passed_over=passed_over,
    )


def _list_flat(folder: Path, inner: str, label_file: Path) -> tuple[list[str], PassedOver]:
    """List the images of a flat split, and what beside them is not read; its label file is."""
    names, passed_over = [], PassedOver()
    for entry in list_entries(folder / inner):
        if is_folder(entry):
            continue
        if is_image(entry):
            names.append(entry.name)
        elif Path(entry.path) != label_file:
            passed_over.add(entry.name)
    for entry in list_entries(folder) if inner else ():
        if not is_folder(entry) and Path(entry.path) != label_file:
            passed_over.add_loose(entry.name, is_image(entry))
    return names, passed_over


def _check_labels(
    path: Path, names: list[str], labels: dict[str, str], classes: tuple[str, ...], folder: Path
) -> None:
    without = [name for name in names if name not in labels]
    missing = sorted(set(labels) - set(names))
    strange = sorted({labels[name] for name in names if name in labels} - set(classes))
    if without:
        raise UserError(
            f"{len(without)} of {len(names)} images in {printable(folder)} have no line in {printable(path)} "
            f"(the first: {printable(without[0])}): add their lines, or remove the images"
        )
    if missing:
        raise UserError(
            f"{printable(path)} names {len(missing)} images that are not in {printable(folder)} "
            f"(the first: {printable(missing[0])}): restore them, or remove their lines"
        )
    if strange:
        raise UserError(
            f"{printable(path)} names {len(strange)} classes that train/ does not have "
            f"(the first: {printable(strange[0])}): the splits must have the same classes"
        )
    if len(classes) < 2:
        raise UserError(f"{printable(path)} knows one class only: there is nothing to tell apart")
