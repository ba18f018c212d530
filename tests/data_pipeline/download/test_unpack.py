"""Archives that mean harm are refused; good ones are unpacked."""

from __future__ import annotations

import stat
import tarfile
from pathlib import Path

import pytest

from data_pipeline.common.errors import CorruptFileError
from data_pipeline.download.unpack import unpack
from tests.helpers.archives import tar_info, tar_of, zip_of
from tests.helpers.http_server import CONTENT


def huge_header() -> bytes:
    """A long name that claims to have 8 GB."""
    info = tar_info("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    info.size = 8_000_000_000
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(10_000)


BAD: dict[str, tuple[bytes, str]] = {
    "parent": (tar_of((tar_info("../x"), b"x")), "a path that leaves its folder, '../x'"),
    "parent inside": (tar_of((tar_info("a/../../x"), b"x")), "a path that leaves its folder"),
    "absolute": (tar_of((tar_info("/x"), b"x")), "a path that leaves its folder, '/x'"),
    "link": (tar_of((tar_info("a", tarfile.SYMTYPE, "/"), b"")), "a link or a device, 'a'"),
    "through a link": (
        tar_of((tar_info("a", tarfile.SYMTYPE, ".."), b""), (tar_info("a/x"), b"x")),
        "a link or a device",
    ),
    "hard link": (tar_of((tar_info("a", tarfile.LNKTYPE, "/etc/passwd"), b"")), "a link or a device"),
    "device": (tar_of((tar_info("a", tarfile.CHRTYPE), b"")), "a link or a device"),
    "pipe": (tar_of((tar_info("a", tarfile.FIFOTYPE), b"")), "a link or a device"),
    "twice": (tar_of((tar_info("a"), b"x"), (tar_info("./a"), b"y")), "twice"),
    "file as folder": (tar_of((tar_info("a"), b"x"), (tar_info("a/b"), b"y")), "as a file and as a folder"),
    "terminal": (tar_of((tar_info("../\x1b[2J"), b"")), r"leaves its folder, '\.\./\\\\x1b\[2J'"),
    "tar bomb": (tar_of((tar_info("a"), bytes(2_000_000))), "unpacks to more than 1000000 bytes"),
    "many": (tar_of(*[(tar_info(str(n)), b"") for n in range(21)]), "holds more than 20 files"),
    "huge header": (huge_header(), "an extended header of 8000000000 bytes"),
    "cut tar": (tar_of((tar_info("a"), b"x" * 600), mode="w:")[:1536], "its end is missing"),
    "cut gzip": (tar_of((tar_info("a"), CONTENT[:900_000]))[:-5000], "is no whole archive"),
    "zip parent": (zip_of(("../x", b"x", 0)), "a path that leaves its folder"),
    "zip drive": (zip_of(("..\\x", b"x", 0)), "a path that leaves its folder"),
    "zip link": (zip_of(("a", b"/etc", stat.S_IFLNK | 0o777)), "a link or a device"),
    "zip bomb": (zip_of(("a", bytes(2_000_000), 0)), "unpacks to more than 1000000 bytes"),
    "zip many": (zip_of(*[(str(n), b"", 0) for n in range(50)]), "holds more than 20 files"),
    "zip damaged": (
        zip_of(("a", CONTENT[:5000], 0)).replace(CONTENT[2000:2004], b"????"),
        "no whole archive",
    ),
    "no archive": (b"<html>not found</html>", "is no whole archive"),
    "empty": (b"", "is no whole archive"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_malicious_archives_are_refused(tmp_path: Path, kind: str) -> None:
    content, reason = BAD[kind]
    archive = tmp_path / "in" / "archive"
    archive.parent.mkdir()
    archive.write_bytes(content)
    with pytest.raises(CorruptFileError, match=reason):
        unpack(archive, tmp_path / "in" / "out", max_bytes=1_000_000, max_files=20)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert {path.name for path in archive.parent.iterdir()} == {"archive", "out"}
    assert not any(path.is_symlink() for path in archive.parent.rglob("*"))


def test_good_archives_are_unpacked(tmp_path: Path) -> None:
    folder = tar_info("a", tarfile.DIRTYPE)
    for number, content in enumerate(
        (
            tar_of((folder, b""), (tar_info("./a/x"), b"one"), (tar_info("b" * 150), b"two")),
            tar_of((tar_info("a/x"), b"one"), (tar_info("b" * 150), b"two"), mode="w:"),
            zip_of(("a/", b"", 0), ("a/x", b"one", 0o100644), ("b" * 150, b"two", 0)),
        )
    ):
        archive, out = tmp_path / f"archive-{number}", tmp_path / f"out-{number}"
        archive.write_bytes(content)
        unpack(archive, out, max_bytes=6, max_files=2)
        assert (out / "a" / "x").read_bytes() == b"one" and (out / ("b" * 150)).read_bytes() == b"two"
        assert not (out / "a" / "x").stat().st_mode & 0o4111
