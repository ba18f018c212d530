"""Finding images: what counts as one, in which order, and what a wrong layout is told."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import read_file
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import check_same_classes
from data_pipeline.datasets.image_folder import load_image_folder
from data_pipeline.datasets.open import open_dataset
from data_pipeline.loading.bad_files import Failure, FaultLog
from tests.helpers.images import encode, photo, write_folder

JPEG = encode(photo(16, 16), "JPEG")


def test_samples_are_sorted_by_class_and_name_in_bytes(tmp_path: Path) -> None:
    for name in (
        "b/2.JPG",
        "b/10.jpeg",
        "a-b/x.png",
        "a/deep/er/y.webp",
        "a/z.tiff",
        "a/.hidden.jpg",
        "a/notes.txt",
    ):
        file = tmp_path / "train" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(JPEG)
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "LICENSE").write_text("not a class")
    dataset = load_image_folder(tmp_path, "train")
    assert dataset.classes == ("a", "a-b", "b")
    assert list(dataset.paths) == ["a/deep/er/y.webp", "a/z.tiff", "a-b/x.png", "b/10.jpeg", "b/2.JPG"]
    assert dataset.labels.tolist() == [0, 0, 1, 2, 2]
    assert len(dataset) == 5 and dataset.path_at(4) == tmp_path / "train" / "b" / "2.JPG"


def test_wrong_layout_is_refused_with_its_fault(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data folder .*nowhere: expected <data>/train/<class>"):
        open_dataset(tmp_path / "nowhere", "train")
    with pytest.raises(UserError, match="no folder 'train' in"):
        open_dataset(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="it holds no class folders"):
        load_image_folder(tmp_path, "train")
    (tmp_path / "train" / "1.jpg").write_bytes(JPEG)
    with pytest.raises(UserError, match="its images lie side by side, not in class folders"):
        load_image_folder(tmp_path, "train")
    write_folder(tmp_path / "train", {"cat": 1})
    with pytest.raises(UserError, match=r"holds one class only \(cat\)"):
        load_image_folder(tmp_path, "train")
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(UserError, match=r"class folder .*dog holds no images"):
        load_image_folder(tmp_path, "train")


def test_splits_with_different_classes_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    write_folder(tmp_path / "val", {"b": 1, "c": 1, "d": 1, "e": 1, "f": 1})
    train, val = load_image_folder(tmp_path, "train"), load_image_folder(tmp_path, "val")
    check_same_classes(train, train)
    with pytest.raises(UserError, match="only in train: a; only in val: c, d, e and 1 more"):
        check_same_classes(train, val)


def test_names_need_not_be_utf8(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    name = os.fsdecode(b"caf\xe9.jpg")
    (tmp_path / "train" / "a" / name).write_bytes(JPEG)
    dataset = load_image_folder(tmp_path, "train")
    assert list(dataset.paths) == ["a/000.jpg", f"a/{name}", "b/000.jpg"]
    assert read_file(dataset.path_at(1), 10**6) == JPEG
    faults = FaultLog()
    with caplog.at_level(logging.WARNING, "data_pipeline"):
        for _ in range(3):
            faults.add(Failure(printable(dataset.paths[1]), "empty file"), dataset.path_at(1))
    assert [record.getMessage() for record in caplog.records] == ["left out a/caf\\xe9.jpg: empty file"]
    assert len(faults) == 1


def test_images_without_suffix_are_opened_others_counted(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    contents = {
        "photo.JFIF": JPEG, "IMG_0001": JPEG, "p.ppm": encode(photo(8, 8), "PPM"), "x.avif": b"",
        "x.jp2": b"", "x.tga": b"", "x.ico": b"", "IMG_2.HEIC": JPEG, "IMG_3.heic": b"",
        "notes": b"BMW X5\n", "list.txt": b"",
        "sound": b"RIFF....WAVEfmt ", "empty": b"", "._IMG_0001": JPEG, "Thumbs.db": b"", ".DS_Store": b"",
        "desktop.ini": b"", "jpg.a-very-long-suffix-of-somebody": b"",
    }  # fmt: skip
    for name, content in contents.items():
        (tmp_path / "train" / "a" / name).write_bytes(content)
    os.mkfifo(tmp_path / "train" / "a" / "pipe")
    (tmp_path / "train" / "a" / "circle").symlink_to("circle")
    dataset = load_image_folder(tmp_path, "train")
    assert [path.removeprefix("a/") for path in dataset.paths][:-1] == [
        "000.jpg", "IMG_0001", "p.ppm", "photo.JFIF", "x.avif", "x.ico", "x.jp2", "x.tga"
    ]  # fmt: skip
    assert dataset.passed_over.by_count == {"": 5, ".heic": 2, ".txt": 1, "others": 1}
    assert dataset.passed_over.sentence() == (
        "9 files that are no images (5 without suffix, 2 .heic, 1 .txt, 1 of other suffixes)"
    )


def test_what_systems_leave_is_no_class(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    for name in ("__MACOSX/a", ".Trashes", "@eaDir", "lost+found"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "train" / "__MACOSX" / "a" / "._000.jpg").write_bytes(b"\0\5\26\7")
    (tmp_path / "train" / "a" / "__MACOSX").mkdir()
    (tmp_path / "train" / "a" / "__MACOSX" / "000.jpg").write_bytes(JPEG)
    (tmp_path / "train" / "Thumbs.db").touch()
    (tmp_path / "train" / "circle").symlink_to("circle")
    dataset = load_image_folder(tmp_path, "train")
    assert dataset.classes == ("a", "b") and len(dataset) == 2
    assert (dataset.passed_over.by_count, dataset.passed_over.num_loose) == ({"": 1}, 0)  # the link


def test_loose_images_beside_classes_are_counted(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    for name in ("1.jpg", "2.PNG", "three"):
        (tmp_path / "train" / name).write_bytes(JPEG)
    (tmp_path / "train" / "README.md").touch()
    found = load_image_folder(tmp_path, "train").passed_over
    assert found.num_loose == 3
    assert found.sentence() == "1 file that is no image (1 .md), 3 images beside the class folders"


def test_class_without_images_says_what_it_holds(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    (tmp_path / "train" / "c").mkdir()
    (tmp_path / "train" / "c" / "IMG_1.HEIC").touch()
    with pytest.raises(UserError, match=r"c holds no images, but 1 file that is no image \(1 .heic\): add"):
        load_image_folder(tmp_path, "train")
