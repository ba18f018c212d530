"""`alexnet data info`: counts, sizes and colours that are exact, and a picture that shows what is there."""

from __future__ import annotations

import base64
import io
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from alexnet import main
from data_pipeline.common.text import visible
from data_pipeline.datasets.exclude_list import QUARANTINE, write_exclude_list
from data_pipeline.inspect.stats import collect_info
from data_pipeline.loading import scan
from data_pipeline.sharding.write import write_shards
from data_pipeline.transforms.augment import Augment
from tests.helpers.images import encode, photo, write_folder
from train.config.load import make_config

HOSTILE = '<img src=x onerror="alert(1)"> & \x1b[31m'


LATIN = os.fsdecode(b"caf\xe9.jpg")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["data", "info", *(str(a) for a in arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, photos and a PNG named .jpg, with readable names, one of them hostile."""
    root = tmp_path / "data"
    write_folder(root / "train", {"n1": 9, "n2": 4, "n3": 5}, side=40)
    write_folder(root / "val", {"n1": 2, "n2": 2, "n3": 2}, side=24)
    (root / "train" / "n2" / LATIN).write_bytes(encode(photo(30, 90), "PNG"))
    (root / "words.txt").write_text(f"n1\tgoldfish\nn2\t{HOSTILE}\n")
    return root


def numpy_statistics(root: Path) -> dict[str, Any]:
    """All pixels at once, in float64."""
    pixels = np.concatenate(
        [
            np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
            for path in sorted((root / "train").rglob("*.jpg"))
        ]
    ).astype(np.float64)
    covariance = np.cov(pixels.T / 255, bias=True)
    values, vectors = np.linalg.eigh(covariance)
    return {
        "num_pixels": len(pixels), "mean": pixels.mean(axis=0) / 255, "std": pixels.std(axis=0) / 255,
        "covariance": covariance, "eigenvalues": values[::-1], "eigenvectors": vectors.T[::-1],
    }  # fmt: skip


def test_info_counts_sizes_and_colours_exactly(folder: Path) -> None:
    result = run(folder, "--json")
    assert result.exit_code == 0, result.stderr
    summary = msgspec.json.decode(result.stdout)
    train, val = summary["splits"]["train"], summary["splits"]["val"]
    assert (train["num_samples"], train["num_examined"], train["sampled"]) == (19, 19, False)
    assert train["per_class"] == {"min": 5, "max": 9, "mean": 19 / 3}
    assert (val["num_samples"], val["per_class"]["max"], val["width"]["max"]) == (6, 2, 32)
    assert train["formats"] == {"JPEG": 18, "PNG": 1} and val["formats"] == {"JPEG": 6}
    assert train["size_bytes"] == sum(p.stat().st_size for p in (folder / "train").rglob("*.jpg"))
    assert train["width"] == {"min": 40, "p5": 40, "median": 48, "p95": 90, "max": 90}
    assert train["height"] == {"min": 30, "p5": 30, "median": 40, "p95": 40, "max": 40}
    assert train["common_sizes"][0] == [40, 40, 7] and train["num_sizes"] == 4
    assert [c["label"] for c in summary["classes"]] == ["goldfish", visible(HOSTILE), "n3"]
    assert summary["classes"][1]["counts"] == {"train": 5, "val": 2} and summary["classes"][2]["id"] == 2

    want, found = numpy_statistics(folder), summary["pixels"]
    assert (found["num_images"], found["num_pixels"]) == (19, want["num_pixels"])
    for name in ("mean", "std", "covariance", "eigenvalues"):
        np.testing.assert_allclose(found[name], want[name], rtol=1e-12, atol=1e-15, err_msg=name)
    # up to their sign, which is ours to choose
    np.testing.assert_allclose(np.abs(found["eigenvectors"]), np.abs(want["eigenvectors"]), atol=1e-9)
    assert all(max(vector, key=abs) > 0 for vector in found["eigenvectors"])
    rebuilt = np.array(found["eigenvectors"]).T * found["eigenvalues"] @ found["eigenvectors"]
    np.testing.assert_allclose(rebuilt, want["covariance"], atol=1e-15)


@pytest.mark.slow
def test_statistics_of_files_shards_and_workers_are_equal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "CHUNK", 4)  # else one process would take all of them
    write_shards(folder, tmp_path / "shards", shard_bytes=10_000)
    one, two, tar = (
        collect_info(root, workers=workers)[0]
        for root, workers in ((folder, 1), (folder, 2), (tmp_path / "shards", 2))
    )
    assert one == two
    assert tar.stored == "tar shards" and one.stored == "files"
    assert msgspec.structs.replace(tar, root=one.root, stored=one.stored) == one


def test_info_of_a_sample_is_marked_and_repeatable(folder: Path) -> None:
    first, again = (run(folder, "--json", "--sample", "5") for _ in range(2))
    assert first.stdout == again.stdout
    summary = msgspec.json.decode(first.stdout)
    train, whole = summary["splits"]["train"], collect_info(folder)[0].splits["train"]
    assert (summary["sample"], train["num_examined"], train["sampled"]) == (5, 5, True)
    assert (train["num_samples"], train["size_bytes"]) == (19, whole.size_bytes)
    assert summary["pixels"]["num_images"] == 5 and sum(train["formats"].values()) == 5
    assert summary["splits"]["val"]["sampled"] is True
    assert collect_info(folder, sample=6)[0].splits["val"].sampled is False
    assert "5 (a sample)" in run(folder, "--sample", "5").stdout
    assert run(folder, "--sample", "0").exit_code == run(folder, "--workers", "0").exit_code == 2


def test_unreadable_files_give_code_3_until_excluded(folder: Path) -> None:
    for number in range(7):
        (folder / "train" / "n3" / f"x{number}.jpg").write_bytes(b"text")
    result = run(folder, "--json")
    assert result.exit_code == 3
    train = msgspec.json.decode(result.stdout)["splits"]["train"]
    assert (train["num_samples"], train["num_unreadable"], sum(train["formats"].values())) == (26, 7, 19)
    assert f"{folder}/train/n3/x0.jpg: not an image of a known format" in result.stderr
    assert "and 2 more images of train" in result.stderr
    write_exclude_list(folder / QUARANTINE, {f"train/n3/x{n}.jpg": "text" for n in range(7)})
    result = run(folder, "--json")
    train = msgspec.json.decode(result.stdout)["splits"]["train"]
    assert result.exit_code == 0
    assert (train["num_samples"], train["num_quarantined"], train["num_unreadable"]) == (19, 7, 0)


def test_info_table_ends_in_keys_that_a_recipe_takes(folder: Path) -> None:
    result = run(folder)
    assert result.exit_code == 0
    said = result.stdout
    assert "3 classes, stored as files" in said and "40 x 40 (7)" in said
    assert "& \\x1b[31m [n2] (5); most: goldfish [n1] (9)" in said
    assert "every class has 2 images" in said
    keys = [line.strip() for line in said.splitlines() if " = " in line]
    assert [key.split(" = ")[0].split(".")[1] for key in keys] == [
        "mean", "std", "pca_eigenvalues", "pca_eigenvectors",
    ]  # fmt: skip
    known = [key for key in keys if hasattr(Augment(), key.split(" = ")[0].split(".")[1]) or "mean" in key]
    config = make_config("demo", [key.replace(" = ", "=") for key in known])
    assert config.preprocessing.mean == pytest.approx(collect_info(folder)[0].pixels.mean, abs=1e-4)  # type: ignore[union-attr]


def test_info_has_no_colours_without_training_images(folder: Path) -> None:
    (folder / "train").rename(folder / "test")
    summary, datasets = collect_info(folder)
    assert summary.pixels is None and [d.split for d in datasets] == ["val", "test"]
    assert "pixels" not in run(folder).stdout


class Page(HTMLParser):
    """The tags, the texts and the pictures of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_grid_page_shows_every_class_and_loads_nothing(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / "n3" / "x.jpg").write_bytes(b"text")
    result = run(folder, "--grid", tmp_path / "grid.html")
    assert result.exit_code == 3 and f"pictures: {tmp_path / 'grid.html'}" in result.stderr
    text = (tmp_path / "grid.html").read_bytes().decode()
    page = Page(text)
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 8 + 5 + 5 and {tag for tag, _ in page.tags}.isdisjoint({"script", "a", "link"})
    assert all(set(p) == {"alt", "title", "src"} for p in pictures)
    assert all((p["src"] or "").startswith("data:image/jpeg;base64,") for p in pictures)
    assert not re.search(r"https?:|onerror=\"", text) and "\x1b" not in text
    assert '<img src=x onerror="alert(1)"> & \\x1b[31m' in page.texts  # as text, not as a tag
    known = "JPEG, PNG, BMP, WebP, TIFF, GIF, PNM, AVIF, JPEG 2000, ICO, TGA"
    assert f"not an image of a known format ({known})" in page.texts
    assert "data / train: 20 images of 3 classes" in page.texts and "6 images" in page.texts
    assert any(p["title"] == "train/n2/caf\\xe9.jpg" for p in pictures)
    encoded = (pictures[0]["src"] or "").partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
        assert image.size == (96, 96)
    before = text
    run(folder, "--grid", tmp_path / "grid.html")
    assert (tmp_path / "grid.html").read_text() == before


@pytest.mark.parametrize("name", ["grid.png", "grid.pdf"])
def test_grid_must_be_html(folder: Path, tmp_path: Path, name: str) -> None:
    wrong = run(folder, "--grid", tmp_path / name)
    assert wrong.exit_code == 2 and "examine" not in wrong.stderr
    assert f"--grid {tmp_path / name}: the name must end in .html" in wrong.stderr


def test_grid_path_is_checked_before_the_work(folder: Path, tmp_path: Path) -> None:
    nowhere = run(folder, "--grid", tmp_path / "nowhere" / "grid.html")
    assert nowhere.exit_code == 2 and "there is no folder" in nowhere.stderr
    assert "examine" not in nowhere.stderr
    (tmp_path / "taken.html").mkdir()
    taken = run(folder, "--grid", tmp_path / "taken.html")
    assert taken.exit_code == 2 and "is a folder: name a file" in taken.stderr
    (tmp_path / "page.html").write_text("<!doctype html>\n<title>mine</title>")
    theirs = run(folder, "--grid", tmp_path / "page.html")
    assert theirs.exit_code == 2 and "examine" not in theirs.stderr
    assert "page.html exists and is not a page that --grid wrote: name another file" in theirs.stderr
