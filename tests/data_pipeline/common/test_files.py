"""Reading and writing: each kind of file or place that is refused has its reason."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from data_pipeline.common.errors import ImageError, SaveError, UserError, line_of
from data_pipeline.common.files import IMAGE_SUFFIXES, check_writable, read_file, writing_to
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


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EROFS, UserError), (errno.EACCES, UserError), (errno.ENOSPC, SaveError)]
)
def test_failed_write_names_the_place_and_what_to_do(number: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^cannot write a/b: .*; name another with --out$"):  # noqa: SIM117
        with writing_to(Path("a/b"), "name another with --out"):
            raise OSError(number, os.strerror(number), "a/b/c")


def test_place_that_cannot_be_written_to_is_found_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "new" / "folder", "x")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^cannot write .*file/x/y: .*/file is not a folder; do$"):
        check_writable(tmp_path / "file" / "x" / "y", "do")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # root may write anywhere
    with pytest.raises(UserError, match=r"^cannot write x\.png: Permission denied; do$"):
        check_writable(tmp_path, "do", Path("x.png"))


def test_line_of_a_systems_error_says_where_and_what_to_do() -> None:
    moved = OSError(errno.ENOSPC, "No space left on device", "from", None, "to\udce9")
    assert line_of(moved) == (
        r"to\xe9: No space left on device; make room there, or name another place",
        1,
    )
    assert line_of(OSError(errno.EROFS, "Read-only")) == ("Read-only; name another place", 1)
    assert line_of(UserError("as it is")) == ("as it is", 2)
    assert line_of(ConnectionRefusedError(errno.ECONNREFUSED, "refused")) is None
    assert line_of(OSError("without a number")) is None and line_of(KeyError("x")) is None
