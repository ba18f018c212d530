"""One file over HTTP, from a real server that breaks off, stalls and lies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import CorruptFileError, SaveError, UserError
from data_pipeline.download.fetch import fetch
from tests.helpers.http_server import CONTENT, MD5, SHA256, Server, serving


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No long waits."""
    for name, value in (("STALL_S", 0.3), ("PAUSE_S", 0.01), ("ATTEMPTS", 3)):
        monkeypatch.setattr(f"data_pipeline.download.fetch.{name}", value)


def get(server: Server, path: Path, **options: Any) -> None:
    known: dict[str, Any] = {
        "size_bytes": len(CONTENT),
        "sha256": SHA256,
    }
    fetch(f"http://127.0.0.1:{server.server_port}/data.bin", path, **(known | options))


@pytest.mark.parametrize(
    ("mode", "asked"),
    [
        ("well", [None]),
        ("redirects", [None, None]),
        ("breaks off", [None, "bytes=1000000-"]),
        ("ignores ranges", [None, "bytes=1000000-"]),
        ("claims nothing", [None, "bytes=1000000-"]),
        ("claims less", [None, "bytes=1500000-"]),
        ("claims more", [None]),
        ("stalls", [None, "bytes=1000-"]),
        ("always breaks off", [None, *(f"bytes={n}00000-" for n in range(4, 30, 4))]),
        ("busy", [None, None]),
    ],
)
def test_fetch_overcomes_a_bad_connection(
    server: Server, tmp_path: Path, mode: str, asked: list[Any]
) -> None:
    server.mode = mode
    get(server, tmp_path / "new" / "data.bin")
    assert (tmp_path / "new" / "data.bin").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data.bin"]
    assert server.asked == asked


def test_fetch_resumes_an_interrupted_download(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, part = tmp_path / "data.bin", tmp_path / "data.bin.part"
    server.mode = "always stalls"
    with pytest.raises(UserError, match=r"no byte for 0.3 s, 3 times in a row.*data.bin.part: run the same"):
        get(server, path)
    kept = part.read_bytes()
    assert CONTENT[:1000] == kept and not path.exists()
    assert any("no byte for 0.3 s after 1000 bytes: trying again" in line for line in caplog.messages)
    server.mode = "well"
    get(server, path)
    assert path.read_bytes() == CONTENT and server.asked[-1] == "bytes=1000-"
    get(server, path)
    assert server.asked[-1] == "bytes=1000-"  # not asked again
    path.write_bytes(b"something else")
    get(server, path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("mode", "options", "error", "reason"),
    [
        ("well", {"sha256": "0" * 64}, CorruptFileError, f"it has the sha256 {SHA256}, not 000"),
        ("well", {"sha256": "", "md5": "0" * 32}, CorruptFileError, f"it has the md5 {MD5}, not 000"),
        ("well", {"size_bytes": 1000}, CorruptFileError, "it has more than 1000 bytes, not 1000"),
        ("goes on for ever", {"size_bytes": 2_000_000}, CorruptFileError, "more than 2000000 bytes"),
        ("goes on for ever", {"size_bytes": None}, CorruptFileError, "it has the sha256 [0-9a-f]*, not"),
        ("claims more", {"size_bytes": None}, UserError, "(ended early|a shorter file).* 3 times in a row"),
        ("well", {"size_bytes": 4_000_000}, UserError, "at 3000000 of 4000000 bytes|a shorter file"),
        ("sends another range", {}, UserError, "sent another range than it was asked for"),
        ("not found", {}, UserError, "the server answered 404 Not Found; use another --mirror"),
        ("redirects to a file", {}, UserError, "file:///etc/passwd.* is not allowed"),
    ],
)
def test_other_than_the_published_file_is_not_kept(
    server: Server, tmp_path: Path, mode: str, options: dict[str, Any], error: type[Exception], reason: str
) -> None:
    server.mode = mode
    if mode == "sends another range":
        (tmp_path / "data.bin.part").write_bytes(CONTENT[:10])
    with pytest.raises(error, match=reason):
        get(server, tmp_path / "data.bin", **options)
    assert not (tmp_path / "data.bin").exists()
    if error is CorruptFileError:
        assert list(tmp_path.iterdir()) == []


def test_fetch_refuses_other_schemes_and_reports_no_server(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no connection \(.*refused.*\), 3 times in a row"):
        fetch("http://127.0.0.1:9/data.bin", tmp_path / "data.bin")
    for url in ("file:///etc/passwd", "ftp://127.0.0.1/x", "data.bin"):
        with pytest.raises(UserError, match="is no http or https address"):
            fetch(url, tmp_path / "data.bin")


def test_full_disk_is_a_save_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").symlink_to("/dev/full")
    with pytest.raises(SaveError, match=r"data.bin.part could not be written: No space left"):
        get(server, tmp_path / "data.bin")
