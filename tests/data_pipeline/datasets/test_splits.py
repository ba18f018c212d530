"""The folder of a split: its usual names, leftovers beside it, and compressed shards."""

from __future__ import annotations

import gzip
import logging
import shutil
from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.datasets import index_cache
from data_pipeline.datasets.exclude_list import QUARANTINE, read_exclude_list
from data_pipeline.datasets.open import open_dataset, splits_of
from data_pipeline.inspect.verify import verify
from data_pipeline.loading.scan import with_table
from data_pipeline.sharding.write import write_shards
from tests.helpers.images import write_folder
from tests.helpers.layouts import make_tiny


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val", "VALIDATION"])
def test_usual_names_are_the_validation_split(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "Training", {"a": 2, "b": 2}, side=16)
    write_folder(tmp_path / name, {"a": 1, "b": 2}, side=16)
    assert splits_of(tmp_path) == ("train", "val")
    val = with_table(open_dataset(tmp_path, "val"), 1)
    assert (val.split, val.folder, len(val)) == ("val", name, 3)
    assert val.name_at(0) == f"{name}/a/000.jpg" and val.path_at(0).is_file() and len(val.read(0)) > 100
    assert val.table is not None and val.table.kinds.tolist() == [1, 1, 1]
    assert list(open_dataset(tmp_path, name).paths) == list(val.paths)
    assert open_dataset(tmp_path, "train").folder == "Training"


def test_quarantine_list_has_the_folders_own_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 2, "b": 2}, side=16)
    write_folder(tmp_path / "valid", {"a": 2, "b": 2}, side=16)
    (tmp_path / "valid" / "a" / "001.jpg").write_bytes(b"text")
    assert verify(tmp_path, workers=1).num_added == 1
    assert list(read_exclude_list(tmp_path / QUARANTINE)) == ["valid/a/001.jpg"]
    assert open_dataset(tmp_path, "val").num_quarantined == 1
    assert verify(tmp_path, ["validation"], workers=1).repaired == ()
    write_shards(tmp_path, tmp_path.parent / f"{tmp_path.name}-shards", workers=1)
    assert splits_of(tmp_path.parent / f"{tmp_path.name}-shards") == ("train", "val")


def test_flat_validation_folder_may_be_named_valid(tmp_path: Path) -> None:
    root = make_tiny(tmp_path)
    want = open_dataset(root, "val")
    (root / "val").rename(root / "valid")
    renamed = open_dataset(root, "val")
    assert list(renamed.paths) == list(want.paths) and renamed.labels.tolist() == want.labels.tolist()
    (root / "valid" / "val_annotations.txt").rename(root / "valid" / "valid_annotations.txt")
    assert list(open_dataset(root, "val").paths) == list(want.paths)


def test_missing_validation_split_names_what_may_be_meant(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1}, side=16)
    with pytest.raises(UserError, match=r"no folder 'val' in .* \(nor valid or validation\): expected"):
        open_dataset(tmp_path, "val")
    write_folder(tmp_path / "Test", {"a": 1, "b": 1}, side=16)
    with pytest.raises(UserError, match="'Test' is not taken for it: name it 'val' if it is for validation"):
        open_dataset(tmp_path, "val")
    for name in ("valid", "Validation"):
        write_folder(tmp_path / name, {"a": 1, "b": 1}, side=16)
    with pytest.raises(UserError, match="holds Validation and valid, and each may be the val split: name"):
        open_dataset(tmp_path, "val")
    write_folder(tmp_path / "val", {"a": 3, "b": 1}, side=16)
    assert len(open_dataset(tmp_path, "val")) == 4, "its own name comes first"


def test_kept_index_is_that_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "SETTLE_NS", -(10**12))
    write_folder(tmp_path / "train", {"a": 1, "b": 1}, side=16)
    write_folder(tmp_path / "valid", {"a": 2, "b": 1}, side=16)
    (tmp_path / "valid" / "a" / "x.heic").touch()
    first = open_dataset(tmp_path, "val", min_cached=1)
    kept = index_cache.load_index(tmp_path, "val", "valid")
    assert kept is not None and (kept.folder, kept.passed_over) == ("valid", first.passed_over)
    assert first.passed_over.suffixes == {".heic": 1}
    write_folder(tmp_path / "val", {"a": 1, "b": 1}, side=16)
    assert len(open_dataset(tmp_path, "val", min_cached=1)) == 2


def test_archive_beside_a_folder_is_no_shard(tmp_path: Path) -> None:
    """As ImageNet's own tar files lie beside what was unpacked from them."""
    write_folder(tmp_path / "train", {"a": 1, "b": 1}, side=16)
    for name in ("ILSVRC2012_img_train.tar", "train.tar.gz", "test_images.tgz"):
        (tmp_path / name).write_bytes(b"an archive")
    assert splits_of(tmp_path) == ("train",)
    assert len(open_dataset(tmp_path, "train")) == 2


def test_compressed_shards_are_refused_in_one_line(tmp_path: Path) -> None:
    write_folder(tmp_path / "d" / "train", {"a": 4, "b": 4}, side=16)
    write_shards(tmp_path / "d", tmp_path / "s", shard_bytes=20_000, workers=1)
    shard = tmp_path / "s" / "train" / "shard-000000.tar"
    packed = gzip.compress(shard.read_bytes())
    shard.with_suffix(".tar.gz").write_bytes(packed)
    message = r"^compressed: .*shard-000000.tar.gz: shards are read at any place, so unpack it to .tar first"
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path / "s", "train")
    shard.unlink()
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path / "s", "train")
    shard.with_suffix(".tar.gz").rename(tmp_path / "my-train-0.tgz")
    with pytest.raises(UserError, match=r"^compressed: .*my-train-0.tgz"):
        open_dataset(tmp_path, "train")
    (tmp_path / "my-train-0.tgz").rename(tmp_path / "my-train-0.tar")
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(Exception, match=r"shard .*my-train-0.tar is compressed: shards are read"):
        open_dataset(tmp_path, "train")


NFC, NFD = "caf\u00e9", "cafe\u0301"


def test_names_in_another_normalisation_are_matched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In bytes, "cafe\u0301" comes before "cafz" and "caf\u00e9" after it: the classes keep train's order."""
    write_folder(tmp_path / "train", {NFC: 2, "cafz": 1}, side=16)
    write_folder(tmp_path / "val", {NFD: 1, "cafz": 2}, side=16)
    train = open_dataset(tmp_path, "train")
    with caplog.at_level(logging.INFO, "data_pipeline"):
        val = open_dataset(tmp_path, "val")
    assert train.classes == val.classes == ("cafz", NFC)
    assert list(val.paths) == ["cafz/000.jpg", "cafz/001.jpg", f"{NFD}/000.jpg"]
    assert val.labels.tolist() == [0, 0, 1] and len(val.read(2)) > 100
    assert caplog.messages == [
        "val: names of class folders differ from those of train in Unicode normalisation alone (NFC, NFD), 1 "
        "of them: matched"
    ]
    (tmp_path / QUARANTINE).write_text(f'{{"path": "val/{NFC}/000.jpg", "reason": "x"}}\n', encoding="utf-8")
    assert open_dataset(tmp_path, "val").num_quarantined == 1
    (tmp_path / QUARANTINE).unlink()
    write_folder(tmp_path / "val", {"tea": 1}, side=16)
    with pytest.raises(UserError, match=r"differ \(only in val: tea\)"):
        open_dataset(tmp_path, "val")
    write_folder(tmp_path / "train", {NFD: 1}, side=16)
    with pytest.raises(UserError, match=r"two class folders of .*train are both named .* normalisations"):
        open_dataset(tmp_path, "train")


def test_label_files_may_be_in_another_normalisation(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {NFD: 1, "tea": 1}, side=16)
    write_folder(tmp_path / "val", {"images": 2}, side=16)
    (tmp_path / "val" / "images" / "000.jpg").rename(tmp_path / "val" / "images" / f"{NFD}.jpg")
    (tmp_path / "val" / "val_annotations.txt").write_text(
        f"{NFC}.jpg\t{NFC}\n001.jpg\ttea\n", encoding="utf-8"
    )
    (tmp_path / "wnids.txt").write_text(f"{NFC}\ntea\n", encoding="utf-8")
    (tmp_path / "words.txt").write_text(f"{NFC}\tcoffee house\n", encoding="utf-8")
    val = open_dataset(tmp_path, "val")
    assert list(val.paths) == [f"images/{NFD}.jpg", "images/001.jpg"] and val.labels.tolist() == [0, 1]
    assert val.classes == (NFD, "tea") and val.labels_text == ("coffee house", "tea")
