"""Downloads against a real server that breaks off, stalls and lies; and archives that mean harm."""

from __future__ import annotations

import hashlib
import io
import stat
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from alexnet import main
from data_pipeline.archives import unpack
from data_pipeline.catalog import CATALOG, Archive
from data_pipeline.download import download
from data_pipeline.errors import CorruptFileError, SaveError, UserError
from data_pipeline.fetch import fetch
from data_pipeline.layouts import open_dataset
from tests.images import encode, photo
from tests.test_data_layouts import make_tiny

CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content`, as badly as `mode` says; `asked` notes the range of each request."""

    content = CONTENT
    mode = "well"
    asked: list[str | None]
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        first = len(server.asked) == 1
        content, mode = server.content, server.mode
        if mode == "redirects" and self.path == "/data.bin":
            self.send_response(302)
            self.send_header("Location", "/elsewhere.bin")
            self.end_headers()
            return
        if mode == "redirects to a file":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        if mode == "not found" or (mode == "busy" and first):
            self.send_error(404 if mode == "not found" else 503)
            return
        start = int(asked[6:-1]) if asked and mode != "ignores ranges" else 0
        if start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            sent = start + 1 if mode == "sends another range" else start
            self.send_header("Content-Range", f"bytes {sent}-{len(content) - 1}/{len(content)}")
        length = len(content) - start
        if mode == "claims more":
            length += 1000
        elif mode == "claims less" and first:
            length //= 2
        if mode not in ("claims nothing", "goes on for ever"):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        end = len(content)
        if mode in ("breaks off", "ignores ranges", "claims nothing") and first:
            end = 1_000_000
        if mode == "always breaks off":
            end = min(end, start + 400_000)
        if mode == "always stalls" or (mode == "stalls" and first):
            self.wfile.write(content[start:1000])
            self.wfile.flush()
            time.sleep(1.5)
            return
        try:
            self.wfile.write(content[start:end])
            if mode == "goes on for ever":
                for _ in range(200):
                    self.wfile.write(bytes(100_000))
        except OSError:
            pass

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def get(server: Server, path: Path, **options: Any) -> None:
    known: dict[str, Any] = {
        "size_bytes": len(CONTENT),
        "sha256": SHA256,
        "stall_s": 0.3,
        "pause_s": 0.01,
        "attempts": 3,
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
def test_a_bad_connection_is_overcome(server: Server, tmp_path: Path, mode: str, asked: list[Any]) -> None:
    server.mode = mode
    get(server, tmp_path / "new" / "data.bin")
    assert (tmp_path / "new" / "data.bin").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["data.bin"]
    assert server.asked == asked


def test_a_later_call_goes_on_where_an_earlier_one_ended(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, part = tmp_path / "data.bin", tmp_path / "data.bin.part"
    server.mode = "always stalls"
    with pytest.raises(UserError, match=r"no byte for 0.3 s, 2 times in a row.*data.bin.part: run the same"):
        get(server, path, attempts=2)
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
def test_what_is_not_the_published_file_is_not_kept(
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


def test_no_server_and_other_addresses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no connection \(.*refused.*\), 2 times in a row"):
        fetch("http://127.0.0.1:9/data.bin", tmp_path / "data.bin", attempts=2, pause_s=0)
    for url in ("file:///etc/passwd", "ftp://127.0.0.1/x", "data.bin"):
        with pytest.raises(UserError, match="is no http or https address"):
            fetch(url, tmp_path / "data.bin")


def test_a_full_disk_is_told(server: Server, tmp_path: Path) -> None:
    (tmp_path / "data.bin.part").symlink_to("/dev/full")
    with pytest.raises(SaveError, match=r"data.bin.part could not be written: No space left"):
        get(server, tmp_path / "data.bin")


def tar_of(*members: tuple[tarfile.TarInfo, bytes], mode: Any = "w:gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tar_info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, 0o4777
    return info


def zip_of(*members: tuple[str, bytes, int]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            opened.writestr(info, data)
    return buffer.getvalue()


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
def test_archives_that_mean_harm_are_refused(tmp_path: Path, kind: str) -> None:
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


def offer(
    server: Server, monkeypatch: pytest.MonkeyPatch, content: bytes, name: str, **options: Any
) -> Callable[[Path], Path]:
    """Put an archive of our own in the catalog's place of a dataset, on the local server as a mirror."""
    server.content = content
    url = CATALOG[name].url
    sha256 = hashlib.sha256(content).hexdigest()
    made = Archive(url, CATALOG[name].folder, sha256=sha256, size_bytes=len(content), **options)
    monkeypatch.setitem(CATALOG, name, made)
    mirror = f"http://127.0.0.1:{server.server_port}/mirror/"
    return lambda target: download(name, target, mirror=mirror, stall_s=0.3, pause_s=0.01)


def packed(folder: Path, arcname: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for path in sorted(folder.rglob("*")):
            opened.write(path, f"{arcname}/{path.relative_to(folder)}")
    return buffer.getvalue()


def test_tiny_imagenet_from_a_mirror(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    content = packed(make_tiny(tmp_path / "made"), "tiny-imagenet-200")
    get_it = offer(server, monkeypatch, content, "tiny-imagenet")
    server.mode = "breaks off" if len(content) > 1_000_000 else "well"
    target = get_it(tmp_path / "data" / "tiny")
    train, val = open_dataset(target, "train"), open_dataset(target, "val")
    assert (len(train), len(val), val.labels_text[0]) == (12, 8, "goldfish")
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]
    asked = len(server.asked)
    assert get_it(target) == target and len(server.asked) == asked
    with pytest.raises(UserError, match="exists and is not tiny-imagenet: give an empty or a new folder"):
        get_it(tmp_path / "made")
    with pytest.raises(UserError, match=r"no dataset 'tinyimagenet': did you mean tiny-imagenet\? there are"):
        download("tinyimagenet", tmp_path / "x")


def test_the_command_line_downloads(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offer(server, monkeypatch, packed(make_tiny(tmp_path / "made"), "tiny-imagenet-200"), "tiny-imagenet")
    mirror = f"http://127.0.0.1:{server.server_port}/mirror/"
    target = tmp_path / "tiny"
    asked = ["data", "download", "tiny-imagenet", str(target), "--mirror", mirror]
    shown = CliRunner().invoke(main, asked)
    assert (shown.exit_code, shown.stdout.strip()) == (0, str(target))
    assert len(open_dataset(target, "val")) == 8
    shown = CliRunner().invoke(main, ["data", "download", "tinyimagenet"])
    assert shown.exit_code == 2 and "did you mean tiny-imagenet?" in shown.stderr


def test_an_archive_of_another_dataset_leaves_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_harm = tar_of((tar_info("cifar-10-batches-bin/../../x"), b"x"))
    for content, reason in (
        (zip_of(("other/x", b"x", 0)), "does not hold a folder cifar-10-batches-bin"),
        (zip_of(("cifar-10-batches-bin/train/x", b"x", 0)), "is not laid out as cifar10 is"),
        (with_harm, "leaves its folder"),
    ):
        with pytest.raises(CorruptFileError, match=reason):
            offer(server, monkeypatch, content, "cifar10")(tmp_path / "data" / "cifar")
        assert list((tmp_path / "data").iterdir()) == []


def test_imagenette_gets_readable_names(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = tmp_path / "made"
    for split in ("train", "val"):
        for wnid in ("n01440764", "n03888257"):
            (made / split / wnid).mkdir(parents=True)
            (made / split / wnid / "1.JPEG").write_bytes(encode(photo(20, 20), "JPEG"))
    words = CATALOG["imagenette-160"].words
    get_it = offer(server, monkeypatch, packed(made, "imagenette2-160"), "imagenette-160", words=words)
    assert open_dataset(get_it(tmp_path / "data"), "val").labels_text == ("tench", "parachute")


def cifar_records(count: int, label_bytes: int, num_classes: int) -> tuple[bytes, np.ndarray[Any, Any]]:
    random = np.random.default_rng(count)
    records = random.integers(0, 256, (count, label_bytes + 3072), dtype=np.uint8)
    records[:, label_bytes - 1] = np.arange(count) % num_classes
    return records.tobytes(), records


@pytest.mark.parametrize(("name", "label_bytes"), [("cifar10", 1), ("cifar100", 2)])
def test_cifar_becomes_an_image_folder(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, label_bytes: int
) -> None:
    folder = CATALOG[name].folder
    train_names = [f"data_batch_{n}.bin" for n in range(1, 6)] if label_bytes == 1 else ["train.bin"]
    data, records = cifar_records(12, label_bytes, 3)
    names = {1: "batches.meta.txt", 2: "fine_label_names.txt"}[label_bytes]
    members = [(tar_info(f"{folder}/{names}"), b"cat\ndog\naquarium_fish\n\n")]
    members += [(tar_info(f"{folder}/{train}"), data) for train in train_names]
    members += [(tar_info(f"{folder}/{'test_batch' if label_bytes == 1 else 'test'}.bin"), data)]
    get_it = offer(server, monkeypatch, tar_of(*members), name, layout=name)
    target = get_it(tmp_path / "data")
    train, val = open_dataset(target, "train"), open_dataset(target, "val")
    assert train.classes == val.classes == ("aquarium_fish", "cat", "dog")
    assert (len(train), len(val)) == (12 * len(train_names), 12)
    with Image.open(target / "val" / "dog" / "00001.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (32, 32, 3)
    assert np.array_equal(pixels[..., 2].ravel(), records[1, label_bytes + 2048 :])

    for content, reason in (
        (data[:-1], "no whole records"),
        (b"\xff" * len(data), "a class that has no name"),
    ):
        members[-1] = (members[-1][0], content)
        with pytest.raises(CorruptFileError, match=reason):
            offer(server, monkeypatch, tar_of(*members), name, layout=name)(tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_the_catalog_says_what_is_verified() -> None:
    for name, archive in CATALOG.items():
        assert archive.url.startswith(("https://", "http://cs231n.stanford.edu/")), name
        assert len(archive.md5) == 32 and len(archive.sha256) in (0, 64) and archive.size_bytes, name
