"""Writing tar shards: the same bytes each time, resumed after a kill, read by other libraries."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import sha256_of
from data_pipeline.datasets.open import open_dataset
from data_pipeline.decode.pillow import decode_rgb
from data_pipeline.sharding.write import parse_size, write_shards
from tests.helpers.images import encode, photo, write_folder


def hashes(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): sha256_of(p) for p in sorted(root.rglob("*")) if p.is_file()}


def test_sharding_is_reproducible_byte_for_byte(files: Path, shards: Path, tmp_path: Path) -> None:
    again = tmp_path / "moved"
    for path in files.rglob("*.*"):
        target = again / path.relative_to(files)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())  # another place, another time, another owner's clock
    write_shards(again, tmp_path / "out", shard_bytes=20_000, workers=1)
    assert hashes(tmp_path / "out") == hashes(shards)
    with tarfile.open(next((tmp_path / "out" / "train").glob("*.tar"))) as tar:
        owners = {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar}
    assert owners == {(0, 0, 0, "", "", 0o644)}
    assert all(path.stat().st_size <= 20_000 for path in (tmp_path / "out").glob("*/*.tar"))
    labels = [json.loads(path.read_bytes())["labels"] for path in sorted((shards / "train").glob("*.json"))]
    assert any(len(set(found)) > 1 for found in labels)  # mixed, for readers that go straight through


@pytest.mark.slow
def test_sharding_resumes_after_a_kill(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_folder(source / "train", {"a": 60, "b": 60}, side=60)
    write_shards(source, tmp_path / "whole", shard_bytes=20_000)
    code = (
        "import sys; from data_pipeline.sharding.write import write_shards\n"
        "write_shards(sys.argv[1], sys.argv[2], shard_bytes=20_000)"
    )
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", code, source, out], stderr=subprocess.DEVNULL)
    while len(list(out.glob("train/*.json"))) < 3 and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "dataset.json").exists()
    (out / "train" / ".shard-000099.tar.writing").write_bytes(b"half")
    report = write_shards(source, out, shard_bytes=20_000)
    assert 3 <= report.num_reused < report.num_shards
    assert hashes(out) == hashes(tmp_path / "whole")
    assert write_shards(source, out, shard_bytes=20_000).num_reused == report.num_shards
    assert hashes(out) == hashes(tmp_path / "whole")

    changed = open_dataset(source, "train").path_at(0)
    changed.write_bytes(changed.read_bytes()[:-1] + b"?")  # the same size
    assert write_shards(source, out, shard_bytes=20_000).num_reused == report.num_shards - 1
    with pytest.raises(UserError, match="holds shards of other data or settings"):
        write_shards(source, out, shard_bytes=30_000)


def test_sharding_resizes_only_longer_images(tmp_path: Path) -> None:
    write_folder(tmp_path / "in" / "train", {"a": 3, "b": 3}, side=80)
    small = encode(photo(30, 50), "PNG")
    (tmp_path / "in" / "train" / "b" / "small.png").write_bytes(small)
    (tmp_path / "in" / "train" / "b" / "text.jpg").write_bytes(b"no image")
    report = write_shards(tmp_path / "in", tmp_path / "out", resize_px=32, quality=80)
    assert report.num_unchanged == 2
    dataset = open_dataset(tmp_path / "out", "train")
    assert list(dataset.paths) == list(open_dataset(tmp_path / "in", "train").paths)
    assert dataset.read(6) == small and dataset.read(7) == b"no image"
    with Image.open(io.BytesIO(dataset.read(1))) as image:
        assert (image.format, image.size) == ("JPEG", (35, 32))


WEBDATASET = """
import hashlib, json, sys, webdataset
samples = webdataset.WebDataset(sys.argv[1:], shardshuffle=False, empty_check=False)
hashed = lambda s: hashlib.sha256(s.get("jpg", s.get("png"))).hexdigest()
found = {s["__key__"]: (int(s["cls"]), hashed(s)) for s in samples}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_shards_are_readable_by_webdataset(files: Path, shards: Path) -> None:
    """In a process of its own, since it leaves its files open."""
    pytest.importorskip("webdataset", reason="needs webdataset: pip install 'alexnet[dev]'")
    urls = sorted((shards / "train").glob("*.tar"))
    done = subprocess.run([sys.executable, "-c", WEBDATASET, *urls], capture_output=True, check=True)
    found = json.loads(done.stdout)
    want = open_dataset(files, "train")
    contents = [(files / "train" / path).read_bytes() for path in want.paths]
    assert found == {
        f"{i:08d}": [int(want.labels[i]), hashlib.sha256(contents[i]).hexdigest()] for i in range(len(want))
    }


def test_shards_are_readable_by_dalis_own_reader(files: Path, shards: Path) -> None:
    import nvidia.dali
    import nvidia.dali.fn

    dali: Any = nvidia.dali
    want = open_dataset(files, "val")
    pipeline = dali.Pipeline(batch_size=len(want), num_threads=1, device_id=None)
    with pipeline:
        paths = [str(path) for path in sorted((shards / "val").glob("*.tar"))]
        pipeline.set_outputs(*dali.fn.readers.webdataset(paths=paths, ext=["jpg;png", "cls"], name="reader"))
    pipeline.build()
    assert pipeline.epoch_size()["reader"] == len(want)
    images, labels = pipeline.run()
    found = {images.at(i).tobytes(): int(labels.at(i).tobytes()) for i in range(len(want))}
    assert found == {want.read(i): int(want.labels[i]) for i in range(len(want))}


def test_wrong_use_is_refused(files: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lies in the data itself"):
        write_shards(files, files)
    with pytest.raises(UserError, match="lies in the data itself"):
        write_shards(files, files / "train" / "out")
    with pytest.raises(UserError, match="holds tar shards already"):
        write_shards(shards, tmp_path / "out")
    with pytest.raises(UserError, match=r"quality must be 1..100"):
        write_shards(files, tmp_path / "out", quality=0)
    write_folder(tmp_path / "in" / "train", {"a": 2, "b": 2})
    (tmp_path / "in" / "train" / "a" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"gone.jpg cannot be read: No such file .*restore it, or remove it"):
        write_shards(tmp_path / "in", tmp_path / "out")
    (tmp_path / "source").symlink_to(files)
    with pytest.raises(UserError, match="lies in the data itself"):
        write_shards(tmp_path / "source", files / "train" / "out")
    assert parse_size("1.5 gb") == 1_500_000_000
    for text in ("", "MB", "-1", "5TB"):
        with pytest.raises(UserError, match="is not a size"):
            parse_size(text)
    assert set(asdict(write_shards(files, tmp_path / "out2"))) >= {"num_samples", "size_bytes"}


def test_shards_and_manifests_of_others_are_not_replaced(files: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    theirs = out / "train" / "shard-000000.tar"  # what writers of WebDataset call theirs, too
    theirs.parent.mkdir(parents=True)
    with tarfile.open(theirs, "w") as tar:
        for name in ("00000000.jpg", "00000000.cls"):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 4, 1.7e9
            tar.addfile(info, io.BytesIO(b"data"))
    before = theirs.read_bytes()
    with pytest.raises(UserError, match=r"holds shards of other data or settings \(shard-000000.tar\)"):
        write_shards(files, out, shard_bytes=20_000)
    assert theirs.read_bytes() == before
    theirs.unlink()
    (out / "dataset.json").write_text('{"mine": true}')
    with pytest.raises(
        UserError, match=r"dataset.json is there, and no manifest of shards: give a new folder"
    ):
        write_shards(files, out, shard_bytes=20_000)
    assert (out / "dataset.json").read_text() == '{"mine": true}'
    (out / "dataset.json").unlink()
    other = out / "notes" / ".essay.writing"
    other.parent.mkdir()
    other.touch()
    write_shards(files, out, shard_bytes=20_000)
    assert other.exists()
    # a kill between a shard and its index, and one that left nothing but a name
    first, second = sorted((out / "train").glob("*.json"))[:2]
    first.unlink()
    second.write_bytes(b"")
    second.with_suffix(".tar").write_bytes(b"")
    report = write_shards(files, out, shard_bytes=20_000)
    assert report.num_reused == report.num_shards - 2
    other.unlink()
    assert hashes(out) == hashes(shards)


def test_shards_keep_rare_kinds_and_files_without_suffix(tmp_path: Path) -> None:
    write_folder(tmp_path / "d" / "train", {"a": 1, "b": 1}, side=16)
    kinds = {"p.jfif": "JPEG", "q.ppm": "PPM", "r.avif": "AVIF", "s.jp2": "JPEG2000", "t.tga": "TGA",
             "IMG_1": "JPEG", "IMG_2": "PPM"}  # fmt: skip
    for name, kind in kinds.items():
        (tmp_path / "d" / "train" / "a" / name).write_bytes(encode(photo(16, 16), kind))
    write_shards(tmp_path / "d", tmp_path / "s", workers=1)
    files, shards = open_dataset(tmp_path / "d", "train"), open_dataset(tmp_path / "s", "train")
    assert [decode_rgb(shards.read(i)).size for i in range(len(shards))] == [(16, 16)] * 9
    assert [shards.read(i) for i in range(9)] == [files.read(i) for i in range(9)]
    assert [Path(shards.name_at(i)).suffix[1:] for i in range(9)] == [
        "jpg", "jpg", "ppm", "jpg", "ppm", "avif", "jp2", "tga", "jpg"
    ]  # fmt: skip
    assert shards.table is not None and shards.table.direct.sum() == 4


def test_foreign_shards_count_what_they_pass_over(tmp_path: Path) -> None:
    jpeg = encode(photo(16, 16), "JPEG")
    members = {
        "0.jfif": jpeg,
        "0.cls": b"0",
        "0.json": b"{}",
        "1": jpeg,
        "1.cls": b"1",
        "2.heic": b"",
        "2.cls": b"1",
    }
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = open_dataset(tmp_path, "train")
    assert [found.read(i) for i in range(len(found))] == [jpeg, jpeg] and found.labels.tolist() == [0, 1]
    assert found.passed_over.by_count == {".heic": 1}
