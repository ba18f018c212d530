"""Outputs: by identity and not by spelling; nothing is replaced that this program did not write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.results.outputs import check_output, identity_at, is_same_place


def is_ours(path: Path) -> bool:
    return path.read_bytes().startswith(b"ours")


def check(path: Path, named: list[Path] | None = None, found: list[Path] | None = None) -> bool:
    return check_output(path, "--to", is_ours, "of us", named=named or [], found=found or [])


def test_an_output_that_is_an_input_is_refused_by_any_name(tmp_path: Path) -> None:
    image = tmp_path / "a.jpg"
    image.write_bytes(b"ours, says its content")
    (tmp_path / "link.jpg").symlink_to(image)
    os.link(image, tmp_path / "hard.jpg")
    (tmp_path / "deep").mkdir()
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    for name in ("a.jpg", "link.jpg", "hard.jpg", "deep/../a.jpg", "elsewhere/a.jpg"):
        with pytest.raises(UserError, match=r"--to .* is an input, or a list of inputs: name another file"):
            check(tmp_path / name, named=[tmp_path / "gone.jpg", image])
    image.write_bytes(b"theirs")
    with pytest.raises(UserError, match="is an input"):
        check(tmp_path / "link.jpg", found=[image])
    image.write_bytes(b"")
    with pytest.raises(UserError, match="is an input"):
        check(tmp_path / "hard.jpg", found=[image])


def test_only_files_of_ours_may_be_replaced(tmp_path: Path) -> None:
    for name, content in {"ours": b"ours", "theirs": b"theirs", "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
    assert check(tmp_path / "ours") is True
    assert check(tmp_path / "empty") is check(tmp_path / "new") is check(Path(os.devnull)) is False
    with pytest.raises(UserError, match=r"--to .*theirs exists and is not of us: name another file"):
        check(tmp_path / "theirs")
    with pytest.raises(UserError, match="is a folder: name a file"):
        check(tmp_path)
    with pytest.raises(UserError, match="ours exists: weights are never replaced; name another file"):
        check_output(tmp_path / "ours", "--to", None, "weights")
    assert (tmp_path / "theirs").read_bytes() == b"theirs"


def test_places_that_are_not_there_yet_are_compared_too(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert identity_at(tmp_path / "new") is None
    assert is_same_place(tmp_path / "new", tmp_path / "link" / "." / "new")
    assert not is_same_place(tmp_path / "new", tmp_path / "other")
    assert not is_same_place(tmp_path / "new", tmp_path)
