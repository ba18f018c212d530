"""Reading one file: each kind that is refused has its reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.common.errors import ImageError
from data_pipeline.common.files import IMAGE_SUFFIXES, read_file
from tests.helpers.ranks import REPOSITORY


def test_files_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "large.jpg").write_bytes(b"x" * 101)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone")
    for name, reason in {
        "missing.jpg": "cannot be read: No such file",
        "dangling.jpg": "cannot be read: No such file",
        "empty.jpg": "empty file",
        "large.jpg": "file of 101 bytes is above the limit of 100",
        "pipe.jpg": "not a regular file",
    }.items():
        with pytest.raises(ImageError, match=reason):
            read_file(tmp_path / name, 100)


def test_file_is_read_whole_though_reads_are_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytes(range(256)) * 40
    (tmp_path / "x.jpg").write_bytes(content)
    read = os.read
    monkeypatch.setattr(os, "read", lambda descriptor, size: read(descriptor, min(size, 1000)))
    assert read_file(tmp_path / "x.jpg", 10**6) == content


def test_docs_name_every_suffix_of_an_image() -> None:
    text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    assert {suffix for suffix in IMAGE_SUFFIXES if f"`{suffix}`" not in text} == set()
