"""Tar shards: the same stream as files, the same bytes each time, readable by others, and never believed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.common.errors import CorruptFileError, ImageError, UserError
from data_pipeline.common.files import sha256_of
from data_pipeline.datasets.open import open_dataset, splits_of
from data_pipeline.loader import Loader, make_backend
from data_pipeline.sharding.write import parse_size, write_shards
from data_pipeline.shards import shard_source
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.preprocessing import Preprocessing
from tests.helpers.images import encode, photo, write_folder

PREPROCESSING = Preprocessing(resize_px=36, crop_px=32)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of three classes in two splits; one is a PNG, one empty, one named in Latin-1."""
    root = tmp_path_factory.mktemp("files")
    write_folder(root / "train", {"a": 12, "b": 9, "c": 7}, suffix=".JPEG")
    write_folder(root / "val", {"a": 4, "b": 4, "c": 4})
    (root / "train" / "b" / "x.png").write_bytes(encode(photo(50, 60), "PNG"))
    (root / "train" / "b" / "empty.jpg").touch()
    (root / "train" / "a" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(encode(photo(50, 60, 3), "JPEG"))
    (root / "words.txt").write_text("a\tapple\nb\tbanana\nc\tcherry\n")
    return root


@pytest.fixture(scope="module")
def shards(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    report = write_shards(files, out, shard_bytes=20_000, workers=2)
    assert (report.num_samples, report.num_reused, report.num_unchanged) == (43, 0, 0)
    assert report.num_shards == len(list(out.glob("*/*.tar"))) > 4
    return out


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """Shards that a test may damage."""
    for path in shards.rglob("*"):
        if path.is_file():
            target = tmp_path / "copy" / path.relative_to(shards)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "copy"


def hashes(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): sha256_of(p) for p in sorted(root.rglob("*")) if p.is_file()}


def test_shards_hold_the_same_dataset(files: Path, shards: Path) -> None:
    assert splits_of(shards) == ("train", "val")
    for split in ("train", "val"):
        want, got = open_dataset(files, split), open_dataset(shards, split)
        assert list(got.paths) == list(want.paths)
        assert got.labels.tolist() == want.labels.tolist()
        assert (got.classes, got.labels_text) == (want.classes, want.labels_text)
        for i in range(len(want)):
            if want.paths[i].endswith("empty.jpg"):
                with pytest.raises(ImageError, match=r"^empty file$"):
                    got.read(i)
            else:
                assert got.read(i) == want.read(i)
    member = got.path_at(5)
    assert member.name == "00000005.jpg" and member.parent.suffix == ".tar" and member.parent.is_file()
    with tarfile.open(member.parent) as tar:
        extracted = tar.extractfile(member.name)
        assert extracted is not None and extracted.read() == got.read(5)


@pytest.mark.parametrize("name", ["dali", "pillow"])
def test_the_stream_is_the_same_bit_for_bit(files: Path, shards: Path, name: Any) -> None:
    backend = make_backend(name, device="cpu", preprocessing=PREPROCESSING, max_batch=10, num_threads=2)
    loader = Loader(backend, PREPROCESSING)

    def stream(root: Path) -> Iterator[tuple[Any, ...]]:
        train, val = open_dataset(root, "train"), open_dataset(root, "val")
        options: dict[str, Any] = {"seed": 5, "global_batch": 10, "num_steps": 7}
        for batches in (
            loader.train(train, Augment(), **options),
            loader.eval(val, micro_batch=5),
        ):
            for batch in batches:
                yield (
                    batch.images.tobytes(), batch.labels.tolist(), batch.indices.tolist(), batch.step,
                    [failure.reason for failure in batch.failures],
                )  # fmt: skip

    from_files, from_shards = list(stream(files)), list(stream(shards))
    backend.close()
    assert from_shards == from_files and len(from_files) == 10
    assert [reason for batch in from_files for reason in batch[4]] == ["empty file"] * 2


def test_the_same_input_gives_the_same_bytes(files: Path, shards: Path, tmp_path: Path) -> None:
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


def test_a_killed_run_is_taken_up_where_it_was(tmp_path: Path) -> None:
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


def test_resizing_shortens_what_is_longer(tmp_path: Path) -> None:
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


def test_webdataset_reads_them(files: Path, shards: Path) -> None:
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


def test_dalis_own_reader_reads_them(files: Path, shards: Path) -> None:
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


def test_shards_from_elsewhere_are_listed_by_their_headers(shards: Path, tmp_path: Path) -> None:
    for path in sorted((shards / "train").glob("*.tar")):
        (tmp_path / f"mine-train-{path.name}").write_bytes(path.read_bytes())
    dataset = open_dataset(tmp_path, "train")
    ours = open_dataset(shards, "train")
    assert dataset.classes == ("0", "1", "2") and len(dataset) == len(ours)
    numbers = [int(Path(path).stem) for path in dataset.paths]
    assert dataset.labels.tolist() == ours.labels[np.array(numbers)].tolist()
    assert dataset.read(2) == ours.read(numbers[2])
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    assert open_dataset(tmp_path, "train").classes == ("a", "b", "c")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"a class 2 and classes.txt names 2 classes"):
        open_dataset(tmp_path, "train")
    shard = next(tmp_path.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(CorruptFileError, match=r"shard .* is no whole tar file"):
        open_dataset(tmp_path, "train")


Edit = Callable[[dict[str, Any]], object]
CRAFTED: dict[str, tuple[Edit, str]] = {
    "behind the end": (
        lambda index: index["offsets"].__setitem__(0, 10**9),
        "an entry lies outside the shard",
    ),
    "over the end": (lambda index: index["sizes"].__setitem__(0, 2**62), "an entry lies outside the shard"),
    "before the start": (lambda index: index["offsets"].__setitem__(0, -512), "lies outside the shard"),
    "beyond 64 bits": (lambda index: index["offsets"].__setitem__(0, 2**70), "is damaged"),
    "unknown class": (lambda index: index["labels"].__setitem__(0, 3), "outside the shard or the classes"),
    "a list too short": (lambda index: index["names"].pop(), "lies outside the shard"),
    "a sample twice": (
        lambda index: index["numbers"].__setitem__(0, index["numbers"][1]),
        "each sample once",
    ),
    "a text for a number": (lambda index: index["sizes"].__setitem__(0, "9"), "is damaged: Expected `int`"),
    "of another set": (lambda index: index.__setitem__("plan", "x"), "is of another set of shards"),
}


@pytest.mark.parametrize("kind", list(CRAFTED))
def test_a_crafted_index_is_refused(copy: Path, kind: str) -> None:
    edit, reason = CRAFTED[kind]
    path = copy / "train" / "shard-000000.json"
    index = json.loads(path.read_bytes())
    edit(index)
    path.write_text(json.dumps(index))
    with pytest.raises(CorruptFileError, match=reason):
        open_dataset(copy, "train")


def test_damaged_shards_are_named(copy: Path) -> None:
    first, second = sorted((copy / "train").glob("*.tar"))[:2]
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    with pytest.raises(CorruptFileError, match=r"shard-000000.tar has \d+ bytes and its index says \d+"):
        open_dataset(copy, "train")
    first.write_bytes(whole)
    second.with_suffix(".json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"shard-000001.json is damaged: .*; write the shards again"):
        open_dataset(copy, "train")
    second.with_suffix(".json").unlink()
    with pytest.raises(CorruptFileError, match=r"cannot read .*shard-000001.json: No such file"):
        open_dataset(copy, "train")
    second.unlink()
    with pytest.raises(CorruptFileError, match=r"and the shards of train differ, first in shard-000001.tar"):
        open_dataset(copy, "train")
    (copy / "dataset.json").write_text("[" * 100_000)
    with pytest.raises(CorruptFileError, match=r"dataset.json is damaged"):
        open_dataset(copy, "train")


def test_a_sample_is_only_read_where_its_header_stands(copy: Path) -> None:
    path = copy / "val" / "shard-000000.json"
    index = json.loads(path.read_bytes())
    for name in ("offsets", "sizes"):  # two samples exchanged: each would be read under the other's label
        index[name][0], index[name][1] = index[name][1], index[name][0]
    path.write_text(json.dumps(index))
    dataset = open_dataset(copy, "val")
    for number in index["numbers"][:2]:
        with pytest.raises(ImageError, match="its shard and the shard's index do not fit each other"):
            dataset.read(number)
    assert dataset.read(index["numbers"][2])
    with pytest.raises(ImageError, match="is above the limit of 10"):
        dataset.read(index["numbers"][2], max_bytes=10)
    shard = path.with_suffix(".tar")
    os.truncate(shard, 600)
    with pytest.raises(ImageError, match="has become shorter than its index says"):
        dataset.read(index["numbers"][2])


def num_open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_many_threads_read_through_few_open_files(
    shards: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_source, "MAX_HANDLES", 2)
    dataset, want = open_dataset(shards, "train"), open_dataset(files, "train")
    before = num_open_files()
    chosen = [
        i for i in np.random.default_rng(0).integers(0, len(want), 2000).tolist() if want.labels[i] != 1
    ]
    expected = {i: want.read(i) for i in set(chosen)}
    gate = threading.Barrier(8)

    def work(part: int) -> bool:
        gate.wait()
        return all(dataset.read(i) == expected[i] for i in chosen[part::8])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert num_open_files() - before <= 8 + 2
    dataset = want
    assert num_open_files() == before


def test_some_of_the_samples(shards: Path) -> None:
    whole = open_dataset(shards, "train")
    part = whole.take(np.array([20, 3, 7]))
    assert [part.read(i) for i in range(3)] == [whole.read(i) for i in (20, 3, 7)]
    assert part.name_at(0) == whole.name_at(20) and part.labels.tolist() == whole.labels[[20, 3, 7]].tolist()


def test_wrong_use_is_told(files: Path, shards: Path, tmp_path: Path) -> None:
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
    assert parse_size("1.5 gb") == 1_500_000_000
    for text in ("", "MB", "-1", "5TB"):
        with pytest.raises(UserError, match="is not a size"):
            parse_size(text)
    assert set(asdict(write_shards(files, tmp_path / "out2"))) >= {"num_samples", "size_bytes"}
