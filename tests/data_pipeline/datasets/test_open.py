"""Layouts are told apart; what would give chance accuracy is refused; the kept index follows the data."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat  # type: ignore[import-untyped]

from data_pipeline.common.errors import UserError
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.datasets import index_cache
from data_pipeline.datasets.image_folder import load_image_folder
from data_pipeline.datasets.open import open_dataset, splits_of
from tests.helpers.images import encode, photo, write_folder

JPEG = encode(photo(16, 16), "JPEG")
WNIDS = ("n01443537", "n01629819", "n02012849", "n03126707")
WORDS = "n01443537\tgoldfish, Carassius auratus\nn01629819\tEuropean fire salamander\n"
CRANES = "n02012849\tcrane\nn03126707\tcrane\n"


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(JPEG)


def make_tiny(root: Path) -> Path:
    """Tiny ImageNet as it is distributed, with four classes."""
    for wnid in WNIDS:
        for number in range(3):
            touch(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
    rows = []
    for number in range(8):
        touch(root / "val" / "images" / f"val_{number}.JPEG")
        rows.append(f"val_{number}.JPEG\t{WNIDS[-1 - number % 4]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    touch(root / "test" / "images" / "test_0.JPEG")
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)))
    (root / "words.txt").write_text("n00001740\tentity\n" + WORDS + CRANES)
    return root


def make_imagenet(root: Path) -> Path:
    """ImageNet as it is distributed: training folders, flat validation images, no labels yet."""
    for wnid in WNIDS:
        touch(root / "train" / wnid / f"{wnid}_1.JPEG")
    for number in range(1, 9):
        touch(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    return root


def answers(root: Path, split: str = "val") -> dict[str, str]:
    """The class of each image, by the image's own name."""
    dataset = open_dataset(root, split)
    return {
        Path(path).name: dataset.classes[label]
        for path, label in zip(dataset.paths, dataset.labels.tolist(), strict=True)
    }


def test_tiny_imagenet_as_distributed(tmp_path: Path) -> None:
    root = make_tiny(tmp_path)
    train, val = open_dataset(root, "train"), open_dataset(root, "val")
    assert train.classes == val.classes == WNIDS
    assert train.class_labels == val.class_labels
    assert val.labels_text == (
        "goldfish",
        "European fire salamander",
        "crane (n02012849)",
        "crane (n03126707)",
    )
    assert train.paths[0] == "n01443537/images/n01443537_0.JPEG" and len(train) == 12
    assert answers(root) == {f"val_{n}.JPEG": WNIDS[-1 - n % 4] for n in range(8)}
    assert val.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert val.name_at(0) == "val/images/val_3.JPEG" and val.read(0) == JPEG
    assert splits_of(root) == ("train", "val")
    with pytest.raises(UserError, match="no file says which is of which class, so accuracy would be chance"):
        open_dataset(root, "test")


def test_imagenet_with_a_list_of_names(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path)
    with pytest.raises(UserError, match=r"side by side.* chance: expected .* or add .*val"):
        open_dataset(root, "val")
    names = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, 9)]
    want = {name: WNIDS[(3 * n) % 4] for n, name in enumerate(names)}
    (root / "val.txt").write_text("".join(f"{name} {wnid}\n" for name, wnid in want.items()))
    assert answers(root) == want
    (root / "val.txt").write_text("".join(f"val/{name} {WNIDS.index(w)}\n" for name, w in want.items()))
    assert answers(root) == want  # Caffe's, by number
    (root / "val.txt").write_text("".join(f"{name} {WNIDS.index(w) + 1}\n" for name, w in want.items()))
    with pytest.raises(UserError, match="numbers classes up to 4 and there are 4: count from 0"):
        open_dataset(root, "val")


def test_imagenet_with_kaggles_table(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path)
    want = {f"ILSVRC2012_val_{n:08d}.JPEG": WNIDS[n % 4] for n in range(1, 9)}
    rows = "".join(f"{name[:-5]},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n" for name, wnid in want.items())
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    (root / "LOC_synset_mapping.txt").write_text((WORDS + CRANES).replace("\t", " "))
    assert answers(root) == want
    assert open_dataset(root, "train").labels_text[0] == "goldfish"


def test_imagenet_with_the_devkit(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path)
    devkit = root / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n4\n3\n2\n1\n4\n3\n")
    with pytest.raises(UserError, match=r"no .*meta.mat: it says which class each number"):
        open_dataset(root, "val")
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    numbered = (WNIDS[3], WNIDS[2], WNIDS[1], WNIDS[0])  # the devkit's own order
    rows = [(n, wnid, "words", 0) for n, wnid in enumerate(numbered, 1)] + [(5, "n00001740", "entity", 4)]
    savemat(devkit / "meta.mat", {"synsets": np.array(rows, dtype=kind)})
    by_number = [numbered[n - 1] for n in (2, 1, 4, 3, 2, 1, 4, 3)]
    assert answers(root) == {f"ILSVRC2012_val_{n:08d}.JPEG": w for n, w in enumerate(by_number, 1)}
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n5\n")
    with pytest.raises(UserError, match=r"line 3: '5' is no class number of meta.mat"):
        open_dataset(root, "val")


def test_labels_that_do_not_fit_the_images_are_refused(tmp_path: Path) -> None:
    root = make_tiny(tmp_path)
    table = root / "val" / "val_annotations.txt"
    whole = table.read_text()
    for text, reason in {
        whole.split("\n", 1)[
            1
        ]: r"1 of 8 images in .* have no line in .*val_annotations.txt \(the first: val_0",
        whole + "val_8.JPEG\tn01443537\n": r"names 1 images that are not in .* \(the first: val_8.JPEG\)",
        whole.replace(WNIDS[0], "n9"): r"names 1 classes that train/ does not have \(the first: n9\)",
        whole + "oops\n": "line 9: expected an image's name and its class",
    }.items():
        table.write_text(text)
        with pytest.raises(UserError, match=reason):
            open_dataset(root, "val")
    table.write_text(whole)
    (root / "wnids.txt").write_text("\n".join((*WNIDS, "n5")))
    with pytest.raises(UserError, match=r"are not those of wnids.txt \(4 and 5, first difference n5\)"):
        open_dataset(root, "val")


def test_splits_of_different_classes_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    write_folder(tmp_path / "val", {"a": 1, "c": 1})
    assert open_dataset(tmp_path, "train").classes == ("a", "b")
    with pytest.raises(UserError, match="only in train: b; only in val: c"):
        open_dataset(tmp_path, "val")
    with pytest.raises(UserError, match=r"'../x' is not the name of a split"):
        open_dataset(tmp_path, "../x")
    with pytest.raises(UserError, match="neither train nor val"):
        splits_of(tmp_path / "train")


def same(root: Path, split: str = "train") -> bool:
    """Whether the opened index is that of a fresh listing."""
    one, other = open_dataset(root, split, min_cached=1), load_image_folder(root, split)
    return list(one.paths) == list(other.paths) and one.labels.tolist() == other.labels.tolist()


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Believe times right after the scan, as if two seconds had passed."""
    monkeypatch.setattr(index_cache, "SETTLE_NS", 0)
    time.sleep(0.02)


CHANGES: dict[str, Callable[[Path], object]] = {
    "added": lambda folder: touch(folder / "a" / "new.jpg"),
    "removed": lambda folder: (folder / "a" / "000.jpg").unlink(),
    "renamed": lambda folder: (folder / "a" / "000.jpg").rename(folder / "a" / "zzz.jpg"),
    "moved": lambda folder: (folder / "a" / "000.jpg").rename(folder / "b" / "moved.jpg"),
    "added below": lambda folder: touch(folder / "b" / "deep" / "new.jpg"),
    "class added": lambda folder: touch(folder / "c" / "1.jpg"),
    "class renamed": lambda folder: (folder / "a").rename(folder / "x"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_the_kept_index_follows_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    write_folder(tmp_path / "train", {"a": 2, "b/deep": 2, "b": 1})
    settle(monkeypatch)
    first = open_dataset(tmp_path, "train", min_cached=1)
    kept = tmp_path / ".alexnet" / "index-train.bin"
    before = kept.stat().st_mtime_ns
    again = open_dataset(tmp_path, "train", min_cached=1)
    assert kept.stat().st_mtime_ns == before and list(again.paths) == list(first.paths)
    times = [(p, p.stat().st_mtime_ns) for p in (tmp_path / "train").rglob("*") if p.is_dir()]
    CHANGES[change](tmp_path / "train")
    for path, modified_ns in times:  # a tool that restores the folders' times does not deceive it
        if path.exists():
            os.utime(path, ns=(modified_ns, modified_ns))
    assert same(tmp_path)
    assert list(open_dataset(tmp_path, "train", min_cached=1).paths) != list(first.paths)


def test_the_kept_index_follows_the_label_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_tiny(tmp_path)
    settle(monkeypatch)
    first = open_dataset(root, "val", min_cached=1)
    table = root / "val" / "val_annotations.txt"
    table.write_text(
        table.read_text().replace(WNIDS[0], "n?").replace(WNIDS[1], WNIDS[0]).replace("n?", WNIDS[1])
    )
    second = open_dataset(root, "val", min_cached=1)
    assert list(second.paths) == [first.paths[i] for i in (2, 3, 0, 1, 4, 5, 6, 7)]
    (root / "words.txt").write_text(WORDS)
    assert open_dataset(root, "val", min_cached=1).labels_text[2] == "n02012849"
    (root / "words.txt").unlink()
    assert open_dataset(root, "val", min_cached=1).labels_text == ()


def test_an_index_made_while_the_data_changed_is_not_believed(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    open_dataset(tmp_path, "train", min_cached=1)
    assert index_cache.load_index(tmp_path, "train") is None  # its folders are younger than SETTLE_NS


def test_a_damaged_or_crafted_index_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_folder(tmp_path / "train", {"a": 2, "b": 2})
    settle(monkeypatch)
    good = open_dataset(tmp_path, "train", min_cached=1)
    kept = tmp_path / ".alexnet" / "index-train.bin"
    whole = kept.read_bytes()
    assert index_cache.load_index(tmp_path, "train") is not None
    for damaged in (b"", whole[:-1], whole[:40] + b"?" + whole[41:]):
        kept.write_bytes(damaged)
        assert index_cache.load_index(tmp_path, "train") is None
    from dataclasses import replace

    from data_pipeline.datasets.watch import Watch

    watch = Watch(tmp_path)
    watch.note(tmp_path / "train")
    for names in (["../x.jpg"] * 4, ["a/../../x.jpg"] * 4, ["/etc/x.jpg"] * 4, ["a/1.jpg"] * 3):
        index_cache.save_index(replace(good, paths=PackedStrings.pack(names)), watch)
        assert index_cache.load_index(tmp_path, "train") is None
    index_cache.save_index(replace(good, labels=good.labels + 1), watch)
    assert index_cache.load_index(tmp_path, "train") is None
    with caplog.at_level(logging.INFO, "data_pipeline"):
        assert same(tmp_path)
    assert caplog.messages == [
        f"the index of {tmp_path} is not one of ours: listing the files again",
        f"index of 4 images kept in {kept}",
    ]


def test_the_index_goes_to_the_users_cache_where_the_data_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    write_folder(root / "train", {"a": 1, "b": 1})
    (root / ".alexnet").write_text("a file where the folder would be")  # as root, modes forbid nothing
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    settle(monkeypatch)
    open_dataset(root, "train", min_cached=1)
    (kept,) = (tmp_path / "cache").rglob("index-train.bin")
    assert index_cache.load_index(root, "train") is not None
    assert [path.name for path in kept.parent.iterdir()] == ["index-train.bin"]
    (tmp_path / "cache").rename(tmp_path / "gone")
    (tmp_path / "cache").write_text("neither here")
    assert same(root)


def test_small_data_leaves_no_file_behind(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    open_dataset(tmp_path, "train")
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_packed_names_are_a_sequence() -> None:
    names = ["a", "", "b/c.jpg", os.fsdecode(b"caf\xe9")]
    packed = PackedStrings.pack(names)
    assert list(packed) == names and [packed[i] for i in range(-4, 4)] == names + names
    assert list(packed[1:3]) == names[1:3] and "b/c.jpg" in packed and len(packed) == 4
    assert list(PackedStrings.join([packed, PackedStrings.pack([]), packed])) == names * 2
    with pytest.raises(IndexError):
        packed[4]
