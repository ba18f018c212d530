"""Inputs named by arguments: files, folders, globs, lists and tar shards, in order."""

from __future__ import annotations

import gzip
import io
import logging
import os
import tarfile
from pathlib import Path
from typing import Any, cast

import pytest

from data_pipeline.common.errors import ImageError, UserError
from data_pipeline.common.files import read_file
from data_pipeline.common.text import printable
from data_pipeline.loader import ImageSource
from infer.predict.inputs import Inputs, find_inputs, path_of
from tests.helpers.images import encode, photo


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def names(inputs: Inputs, root: Path) -> list[str]:
    return [str(path_of(item).relative_to(root)) for item in inputs]


def test_inputs_are_files_folders_and_globs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "b/0.jpg", "b/deep/x.PNG", "a/1.jpg", "a/.hidden.jpg", "a/notes.txt", "photo.data")
    assert names(find_inputs([tmp_path]), tmp_path) == ["a/1.jpg", "b/0.jpg", "b/deep/x.PNG"]
    some = find_inputs([tmp_path / "photo.data", tmp_path / "b"], recursive=False)
    assert names(some, tmp_path) == ["photo.data", "b/0.jpg"] and some.total == 2
    assert names(some, tmp_path) == ["photo.data", "b/0.jpg"], "it can be walked again"
    assert names(find_inputs([f"{tmp_path}/*/?.jpg"]), tmp_path) == ["a/1.jpg", "b/0.jpg"]
    assert names(find_inputs([f"{tmp_path}/**/*.PNG"]), tmp_path) == ["b/deep/x.PNG"]
    touch(tmp_path, "[x].jpg", "x.jpg")
    assert names(find_inputs([tmp_path / "[x].jpg"]), tmp_path) == ["[x].jpg"], (
        "a file of that name comes first"
    )
    (tmp_path / "empty").mkdir()
    assert find_inputs([tmp_path / "empty", tmp_path / "a"]).total == 1
    assert caplog.messages == [f"no images in {tmp_path / 'empty'}"]


def test_inputs_that_do_not_exist_are_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for argument, words in {
        "missing.jpg": "no such file or folder: .*missing.jpg",
        "*.jpg": "no file or folder matches .*",
        "empty": r"no images in .*empty: looked for .jpg, .png.*shards/\*.tar",
    }.items():
        with pytest.raises(UserError, match=words):
            find_inputs([tmp_path / argument])
    with pytest.raises(UserError, match=r"cannot read the list .*gone.txt: No such file"):
        find_inputs([f"@{tmp_path}/gone.txt"])


def test_links_to_a_parent_folder_are_not_followed(tmp_path: Path) -> None:
    touch(tmp_path, "a/0.jpg")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "linked").symlink_to(tmp_path / "a")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    assert names(find_inputs([tmp_path]), tmp_path) == ["a/0.jpg", "circle.jpg", "linked/0.jpg"]
    for path, words in ((tmp_path / "circle.jpg", "Too many levels"), (Path("nul\0.jpg"), "embedded null")):
        with pytest.raises(ImageError, match=f"cannot be read: {words}"):
            read_file(path, 1000)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\0"])
def test_lists_name_paths_that_need_not_be_there(tmp_path: Path, end: bytes) -> None:
    lines = [b"/a/b.jpg", b"", b"caf\xe9.jpg", b" spaced .jpg", b"last.jpg"]
    (tmp_path / "list.txt").write_bytes(end.join(lines))
    expected = ["/a/b.jpg", os.fsdecode(b"caf\xe9.jpg"), " spaced .jpg", "last.jpg"]
    from_file = find_inputs([f"@{tmp_path}/list.txt"])
    assert [str(item) for item in from_file] == expected and from_file.total == 4
    from_stdin = find_inputs(["-"], stdin=io.BytesIO(end.join(lines)))
    assert [str(item) for item in from_stdin] == expected and from_stdin.total is None


def test_shards_in_a_list_are_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar")
    lines = [tmp_path / "a.jpg", tmp_path / "s.tar", tmp_path / "gone.tar"]
    (tmp_path / "list.txt").write_text("\n".join(map(str, lines)))
    found = find_inputs([f"@{tmp_path}/list.txt"])
    assert found.total is None, "nobody knows how many images a shard holds"
    members = [f"s.tar/{name}" for name in ("000.jpg", "deep/001.PNG", "002.webp", "003.jpg", "004.jpg")]
    for _ in range(2):
        assert names(found, tmp_path) == ["a.jpg", *members, "gone.tar"]
    stdin = io.BytesIO((tmp_path / "list.txt").read_bytes())
    assert names(find_inputs(["-"], stdin=stdin), tmp_path) == ["a.jpg", *members, "gone.tar"]


def test_file_that_is_no_list_is_refused_in_little_memory(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"a.jpg\n" + b"x" * (1 << 18))
    with pytest.raises(UserError, match=r"list.txt is no list of paths: a line has more than 65536 bytes"):
        find_inputs([f"@{tmp_path}/list.txt"])
    walk = iter(find_inputs(["-"], stdin=io.BytesIO((tmp_path / "list.txt").read_bytes())))
    assert str(next(walk)) == "a.jpg"
    with pytest.raises(UserError, match="stdin is no list of paths"):
        next(walk)


def test_nul_separated_lists_keep_line_ends_in_names() -> None:
    found = find_inputs(["-"], stdin=io.BytesIO(b"a\nb.jpg\0c\n\nd.jpg\0"))
    assert [str(item) for item in found] == ["a\nb.jpg", "c\n\nd.jpg"]


def write_shard(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for name in ("000.jpg", "000.cls", "deep/001.PNG", "._x.jpg", "002.webp"):
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
        for name, kind in (
            ("003.jpg", tarfile.SYMTYPE),
            ("004.jpg", tarfile.LNKTYPE),
            ("f.jpg", tarfile.DIRTYPE),
        ):
            odd = tarfile.TarInfo(name)
            odd.type, odd.linkname = kind, "/etc/passwd"
            tar.addfile(odd)


def test_tar_shards_give_their_images_and_follow_no_links(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar")
    found = list(find_inputs([tmp_path / "*.tar"]))
    assert names(find_inputs([tmp_path / "s.tar"]), tmp_path) == [
        "s.tar/000.jpg", "s.tar/deep/001.PNG", "s.tar/002.webp", "s.tar/003.jpg", "s.tar/004.jpg"
    ]  # fmt: skip
    assert all(isinstance(item, ImageSource) for item in found)
    assert [item.read(100) for item in found[:3] if isinstance(item, ImageSource)] == [
        b"000.jpg", b"deep/001.PNG", b"002.webp"
    ]  # fmt: skip
    for link in found[3:]:
        with pytest.raises(ImageError, match=r"a link or another thing .* it is not followed"):
            link.read(100)  # type: ignore[union-attr]
    with pytest.raises(ImageError, match="7 bytes is above the limit of 6"):
        found[0].read(6)  # type: ignore[union-attr]


@pytest.mark.parametrize("damage", ["cut", "zip", "gone"])
def test_damaged_shard_is_an_input_with_its_error(tmp_path: Path, damage: str) -> None:
    shard = tmp_path / "s.tar"
    write_shard(shard)
    inputs = find_inputs([shard])
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[: 4 * 512 + 100])
    elif damage == "zip":
        shard.write_bytes(b"PK\3\4" + b"x" * 2000)
    else:
        shard.unlink()
    *images, last = inputs
    assert len(images) == (1 if damage == "cut" else 0)
    assert isinstance(last, ImageSource) and printable(last.path) == str(shard)
    with pytest.raises(ImageError, match=f"no whole tar file, {len(images)} images before the damage"):
        last.read(10**6)


def test_endless_list_is_read_lazily(caplog: pytest.LogCaptureFixture) -> None:
    class Endless(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
            buffer[:8] = b"abc.jpg\n"
            return 8

    with caplog.at_level(logging.INFO):
        walk = iter(find_inputs(["-"], stdin=io.BufferedReader(cast(Any, Endless()))))
        assert [str(next(walk)) for _ in range(3)] == ["abc.jpg"] * 3


@pytest.mark.parametrize("end", [b"\n", b"\0"])
def test_lists_may_begin_with_a_byte_order_mark(tmp_path: Path, end: bytes) -> None:
    content = end.join([b"\xef\xbb\xbfa.jpg", b"b.jpg"])
    (tmp_path / "list.txt").write_bytes(content)
    for found in (find_inputs([f"@{tmp_path}/list.txt"]), find_inputs(["-"], stdin=io.BytesIO(content))):
        assert [str(item) for item in found] == ["a.jpg", "b.jpg"]


JPEG = b"\xff\xd8\xff\xe0\0\x10JFIF\0" + b"x" * 1000


def starts_of_images() -> list[bytes]:
    from PIL import Image

    starts = []
    for format in ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF"):
        buffer = io.BytesIO()
        Image.new("RGB", (300, 300)).save(buffer, format)
        starts.append(buffer.getvalue())
    return starts


def test_an_image_on_stdin_is_one_input() -> None:
    for image in starts_of_images():
        (item,) = find_inputs(["-"], stdin=io.BytesIO(image))
        assert isinstance(item, ImageSource) and str(item.path) == "-"
        assert item.read(10**6) == image
    (item,) = find_inputs(["-"], stdin=io.BytesIO(JPEG))
    assert isinstance(item, ImageSource)
    with pytest.raises(ImageError, match="more than the limit of 900 bytes"):
        item.read(900)


def test_paths_that_begin_as_an_image_does_are_a_list() -> None:
    for names in (["BM/0.jpg"], ["RIFF", "GIF89a.gif"], ["GIF8"], ["II*"]):
        for end in (b"\n", b"\0"):
            listed = find_inputs(["-"], stdin=io.BytesIO(end.join(map(str.encode, names))))
            assert [str(item) for item in listed] == names


def test_what_is_no_list_of_paths_is_named(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar")
    for content, words in (
        ((tmp_path / "s.tar").read_bytes(), "is a tar file and no list of paths: give it as shard.tar"),
        (b"\x1f\x8b\x08\0 packed", "is a gzip file and no list of paths: unpack it"),
        (b"PK\3\4 packed", "is a zip file"),
        ("\ufeffa.jpg\n".encode("utf-16-le"), "is text in UTF-16: save it as UTF-8"),
    ):
        (tmp_path / "list").write_bytes(content)
        with pytest.raises(UserError, match=f"list {words}"):
            find_inputs([f"@{tmp_path}/list"])
        with pytest.raises(UserError, match=f"stdin {words}"):
            list(find_inputs(["-"], stdin=io.BytesIO(content)))
    (tmp_path / "photo.jpg").write_bytes(JPEG)
    with pytest.raises(UserError, match=r"photo.jpg is an image and no list of paths: leave out the @"):
        find_inputs([f"@{tmp_path}/photo.jpg"])


def test_what_is_no_image_is_passed_over_and_counted(tmp_path: Path) -> None:
    jpeg = encode(photo(8, 8), "JPEG")
    touch(tmp_path, "f/a.jfif", "f/b.heic", "f/deep/c.txt", "f/__MACOSX/d.jpg", "f/Thumbs.db")
    (tmp_path / "f" / "IMG_1").write_bytes(jpeg)
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in (("0.avif", b""), ("0.cls", b"1"), ("1", jpeg), ("2", b"text"), ("3.heic", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = find_inputs([tmp_path / "f", tmp_path / "s.tar"])
    assert found.passed_over.by_count == {".heic": 1, ".txt": 1}
    for _ in range(2):
        assert names(found, tmp_path) == ["f/IMG_1", "f/a.jfif", "s.tar/0.avif", "s.tar/1"]
        assert found.passed_over.by_count == {".heic": 2, "": 1, ".txt": 1}
    with pytest.raises(
        UserError, match=r"no images in .*deep, but 1 file that is no image \(1 .txt\): looked"
    ):
        find_inputs([tmp_path / "f" / "deep"])


def test_compressed_shards_are_told_to_be_unpacked(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar")
    (tmp_path / "s.tar.gz").write_bytes(gzip.compress((tmp_path / "s.tar").read_bytes()))
    with pytest.raises(UserError, match=r"s.tar.gz is compressed: .* unpack it to .tar first, with gunzip"):
        find_inputs([tmp_path / "s.tar.gz"])
    (tmp_path / "list.txt").write_text(f"{tmp_path}/s.tar.gz\n")
    (tmp_path / "s.tar").write_bytes((tmp_path / "s.tar.gz").read_bytes())
    for item in (*find_inputs([f"@{tmp_path}/list.txt"]), *find_inputs([tmp_path / "s.tar"])):
        assert isinstance(item, ImageSource)
        with pytest.raises(ImageError, match=r"compressed.*: shards are read at any place, so unpack it"):
            item.read(10**6)
