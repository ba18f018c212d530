"""The quarantine list: written whole, read with suspicion, honoured by every layout."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from data_pipeline.common.errors import SaveError, UserError
from data_pipeline.datasets import exclude_list as quarantine
from data_pipeline.datasets.exclude_list import QUARANTINE, read_exclude_list, write_exclude_list
from data_pipeline.datasets.open import open_dataset
from tests.helpers.images import write_folder

LATIN = os.fsdecode(b"train/a/caf\xe9.jpg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_folder(tmp_path / "train", {"a": 3, "b": 2}, side=16)
    write_folder(tmp_path / "val", {"a": 1, "b": 1}, side=16)
    return tmp_path


def test_exclude_list_round_trips_any_name_and_reason(tmp_path: Path) -> None:
    path = tmp_path / QUARANTINE
    reasons = {LATIN: "empty file", 'val/"\n\u2028\t.jpg': 'a "reason"\nof two lines', "val/ü/猫.jpg": "ü"}
    write_exclude_list(path, reasons)
    assert read_exclude_list(path) == reasons and list(read_exclude_list(path)) == list(reasons)
    assert path.read_bytes().count(b"\n") == 3
    write_exclude_list(path, {})
    assert read_exclude_list(path) == {}
    assert [child.name for child in tmp_path.iterdir()] == [QUARANTINE]
    path.write_text('\n  \n{"path": "x", "reason": "by hand\u2028", "who": "me"}\r\n')
    assert read_exclude_list(path) == {"x": "by hand\u2028"}
    path.write_bytes(b'\xef\xbb\xbf{"path": "x", "reason": "by hand"}\n')
    assert read_exclude_list(path) == {"x": "by hand"}
    with pytest.raises(SaveError, match="could not be written"):
        write_exclude_list(tmp_path / "nowhere" / QUARANTINE, {})


HOSTILE = {
    "text": b"train/a/000.jpg\n",
    "a number": b"7\n",
    "a list": b'["train/a/000.jpg", "x"]\n',
    "no reason": b'{"path": "x"}\n',
    "a number for a path": b'{"path": 1, "reason": "x"}\n',
    "nothing for a reason": b'{"path": "x", "reason": null}\n',
    "nested": b"[" * 100_000 + b"\n",
    "not UTF-8": b'{"path": "caf\xe9", "reason": "x"}\n',
    "a lone surrogate": b'{"path": "\\ud800", "reason": "x"}\n',
    "zeros": bytes(4096),
}


@pytest.mark.parametrize("kind", list(HOSTILE))
def test_malformed_list_is_refused_with_its_line(folder: Path, kind: str) -> None:
    path = folder / QUARANTINE
    path.write_bytes(b'{"path": "train/a/001.jpg", "reason": "x"}\n' + HOSTILE[kind])
    with pytest.raises(
        UserError, match=r"quarantine.jsonl line 2 is not .*: mend or remove the list"
    ) as error:
        open_dataset(folder, "train")
    assert "\n" not in str(error.value)


def test_huge_exclude_list_is_refused_before_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / QUARANTINE
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(
        UserError, match=r"has 1099511627776 bytes, which no quarantine list has .*: remove it"
    ):
        read_exclude_list(path)
    path.write_bytes(b'{"path": "' + b"x" * (1 << 20))
    with pytest.raises(UserError, match="line 1 is too long for a path and a reason"):
        read_exclude_list(path)
    monkeypatch.setattr(quarantine, "MAX_LIST_BYTES", 10)
    with pytest.raises(UserError, match=r"limit 10\)"):
        read_exclude_list(path)


def test_exclude_paths_outside_the_data_are_reported_not_opened(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [
        "train/../../../etc/passwd",
        "/etc/passwd",
        "../x.jpg",
        "",
        "train/a/000.jpg",
        "train/a/gone.jpg",
    ]
    (folder / QUARANTINE).write_text("".join(json.dumps({"path": n, "reason": ""}) + "\n" for n in names))
    with caplog.at_level(logging.INFO, "data_pipeline"):
        train = open_dataset(folder, "train")
    assert list(train.paths) == ["a/001.jpg", "a/002.jpg", "b/000.jpg", "b/001.jpg"]
    assert caplog.messages == [
        f"2 entries of {folder / QUARANTINE} name no image of train: alexnet data verify renews the list",
        "train: 1 of 5 images in quarantine left out",
    ]
    val = open_dataset(folder, "val")
    assert (len(val), val.num_quarantined) == (2, 0)


def test_exclude_list_keeps_classes_and_at_least_one_image(folder: Path) -> None:
    write_exclude_list(folder / QUARANTINE, {f"train/b/{n:03d}.jpg": "x" for n in range(2)})
    train = open_dataset(folder, "train")
    assert train.classes == ("a", "b") and train.labels.tolist() == [0, 0, 0]
    assert len(open_dataset(folder, "train", quarantine=False)) == 5
    write_exclude_list(folder / QUARANTINE, {f"val/{c}/000.jpg": "x" for c in "ab"})
    with pytest.raises(UserError, match="names every image of val: nothing would be left"):
        open_dataset(folder, "val")
    own = folder / "own.jsonl"
    with pytest.raises(UserError, match=r"no quarantine list .*own.jsonl"):
        open_dataset(folder, "train", quarantine=own)
    write_exclude_list(own, {"train/a/002.jpg": "mislabelled"})
    assert list(open_dataset(folder, "train", quarantine=own).paths)[2] == "b/000.jpg"


def test_exclude_list_must_be_a_regular_file(folder: Path) -> None:
    (folder / QUARANTINE).mkdir()
    with pytest.raises(UserError, match=r"quarantine.jsonl is not a regular file: remove it"):
        open_dataset(folder, "train")
    (folder / QUARANTINE).rmdir()
    (folder / QUARANTINE).symlink_to("nowhere")
    with pytest.raises(UserError, match=r"is not a regular file"):
        open_dataset(folder, "train")
