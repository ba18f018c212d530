"""Datasets by name: from a server to a folder that training reads."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from alexnet import main
from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.datasets.open import open_dataset
from data_pipeline.download.catalog import CATALOG, Archive
from data_pipeline.download.download import download
from tests.helpers.archives import tar_info, tar_of, zip_of
from tests.helpers.http_server import Server, serving
from tests.helpers.images import encode, photo
from tests.helpers.layouts import make_tiny


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


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
    monkeypatch.setattr("data_pipeline.download.fetch.STALL_S", 0.3)
    monkeypatch.setattr("data_pipeline.download.fetch.PAUSE_S", 0.01)
    return lambda target: download(name, target, mirror=mirror)


def packed(folder: Path, arcname: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for path in sorted(folder.rglob("*")):
            opened.write(path, f"{arcname}/{path.relative_to(folder)}")
    return buffer.getvalue()


def test_download_of_tiny_imagenet_from_a_mirror(
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


def test_download_command_prints_the_folder(
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


def test_download_of_another_datasets_archive_leaves_nothing(
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


def test_download_gives_imagenette_readable_names(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = tmp_path / "made"
    for split in ("train", "val"):
        for synset_id in ("n01440764", "n03888257"):
            (made / split / synset_id).mkdir(parents=True)
            (made / split / synset_id / "1.JPEG").write_bytes(encode(photo(20, 20), "JPEG"))
    names = CATALOG["imagenette-160"].class_names
    get_it = offer(server, monkeypatch, packed(made, "imagenette2-160"), "imagenette-160", class_names=names)
    assert open_dataset(get_it(tmp_path / "data"), "val").labels_text == ("tench", "parachute")


def cifar_records(count: int, label_bytes: int, num_classes: int) -> tuple[bytes, np.ndarray[Any, Any]]:
    random = np.random.default_rng(count)
    records = random.integers(0, 256, (count, label_bytes + 3072), dtype=np.uint8)
    records[:, label_bytes - 1] = np.arange(count) % num_classes
    return records.tobytes(), records


@pytest.mark.parametrize(("name", "label_bytes"), [("cifar10", 1), ("cifar100", 2)])
def test_download_turns_cifar_into_an_image_folder(
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


def test_catalog_has_the_hash_and_size_of_each_archive() -> None:
    for name, archive in CATALOG.items():
        assert archive.url.startswith(("https://", "http://cs231n.stanford.edu/")), name
        assert len(archive.md5) == 32 and len(archive.sha256) in (0, 64) and archive.size_bytes, name
