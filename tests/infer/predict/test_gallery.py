"""The page of predictions: escaped and self-contained, and what a real Chromium makes of it."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from alexnet import main
from infer.bundle.load import Bundle
from infer.predict.gallery import open_gallery
from infer.predict.rows import ErrorRow, OkRow, Prediction, PredictionWithPixels
from infer.predict.table import RowCounter
from infer.runtime.onnx import OnnxBackend
from tests.helpers.images import photo


def write_gallery(bundle: Bundle, files: list[Path], folder: Path) -> Path:
    shutil.copy(files[0], folder / "<b>&'\".png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    output = folder / "gallery.html"
    inputs = [*files[:5], folder / "<b>&'\".png", folder / "broken.jpg"]
    rows = folder / "rows.jsonl"
    options = ("--model", bundle.folder, "--device", "cpu", "--output", rows, "--html", output)
    result = CliRunner().invoke(main, ["predict", *map(str, inputs), *map(str, options)])
    assert result.exit_code == 3, result.stderr
    assert len((folder / "rows.jsonl").read_bytes().splitlines()) == 7
    return output


def test_gallery_is_escaped_and_holds_everything(bundle: Bundle, files: list[Path], tmp_path: Path) -> None:
    page = write_gallery(bundle, files, tmp_path).read_text()
    assert page.count('<img alt="" src="data:image/jpeg;base64,') == 6 and page.count('class="error"') == 1
    assert "&lt;b&gt;&amp;&#x27;&quot;.png" in page and "<b>" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page) and "http" not in page.replace("http-equiv", "")
    assert "default-src &#x27;none" in page or "default-src 'none'" in page
    assert "7 images, 1 of them could not be read" in page


@pytest.mark.slow
def test_gallery_sorts_and_filters_in_a_browser(
    bundle: Bundle, files: list[Path], tmp_path: Path, browser: Callable[..., str]
) -> None:
    page = write_gallery(bundle, files, tmp_path)

    def shown(state: str) -> tuple[list[str], str]:
        document = browser(f"{page.as_uri()}#{state}")
        rows = re.findall(r"<tr([^>]*)><td>", document)
        visible = [row for row in rows if "hidden" not in row]
        message = re.search(r"<output>([^<]*)</output>", document)
        assert len(rows) == 7 and message is not None
        assert 'errors only<span id="count"> (1)</span>' in document
        return [re.search(r'data-n="(\d+)"', row)[1] for row in visible], message[1]  # type: ignore[index]

    assert shown("") == ([str(n) for n in range(7)], "7 of 7 shown")
    assert shown("errors=1") == (["6"], "1 of 7 shown")
    assert shown("find=%3Cb%3E") == (["5"], "1 of 7 shown")
    text = page.read_text()
    values = {n: float(p) for n, p in re.findall(r'data-n="(\d+)" data-p="([-\d.]+)"', text) if n != "6"}
    least_first, _ = shown("sort=probability")
    assert least_first == [*sorted(values, key=lambda n: (values[n], int(n))), "6"] != sorted([*values, "6"])
    best_first, _ = shown("sort=-probability")
    assert best_first == [*sorted(values, key=lambda n: (-values[n], int(n))), "6"]
    below, _ = shown("below=60")
    assert below == [n for n in sorted(values) if values[n] < 0.6]


def screenshot(browser: Callable[..., str], page: Path, width: int) -> NDArray[np.int64]:
    picture = page.with_suffix(f".{width}.png")
    browser(page.as_uri(), f"--screenshot={picture}", f"--window-size={width},1500")
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB")).astype(np.int64)
    assert pixels.shape == (1500, width, 3)
    return pixels


def assert_margins_are_empty(pixels: NDArray[np.int64]) -> None:
    for margin in (pixels[:, :14], pixels[:, -14:]):
        assert margin.min() > 240, "something runs out of the page"


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 500])
def test_gallery_shows_pictures_and_bars_at_any_width(
    bundle: Bundle, files: list[Path], tmp_path: Path, browser: Callable[..., str], width: int
) -> None:
    pixels = screenshot(browser, write_gallery(bundle, files, tmp_path), width)
    blue = np.abs(pixels - (0x3A, 0x7B, 0xD5)).max(axis=2) < 8
    red = (pixels[..., 0] - pixels[..., 1:].max(axis=2) > 80).sum()
    assert blue.any(axis=0).sum() > 48, "the longest bar is no line"
    assert blue.any(axis=1).sum() > 6 * 6, "six bars of best classes"
    assert red > 100, "the error's text"
    assert_margins_are_empty(pixels)


ATTACKS = (
    "</title></style></script><script>document.title='owned'</script>.jpg",
    '"><img src=x onerror="document.title=\'owned\'">.jpg',
    "' onmouseover='document.title=1' x='.jpg",
    "&lt;b&gt;&amp;.jpg",
    "javascript:alert(1)",
    "\x1b[31m\u202egpj.elif\n\r\t\0.jpg",
    "caf\\xe9/größe 数 猫 🐈.jpg",
    "deep/" * 60 + "n.jpg",
    "n" * 255,
)


def test_gallery_names_classes_as_the_data_does_too(bundle: Bundle, tmp_path: Path) -> None:
    page, backend = tmp_path / "named.html", OnnxBackend(bundle, "cpu")
    names = (("<i>goldfish</i>, 'x'", "n01443537"), ("crane", '"><b>'))
    found = tuple(Prediction(class_id=1, class_name=n, label=label, probability=0.5) for label, n in names)
    with open_gallery(page, bundle, RowCounter(backend)) as gallery:
        pixels = np.asarray(photo(56, 56))
        gallery.write(PredictionWithPixels(OkRow(path="a.jpg", predictions=found), pixels))
    backend.close()
    body = page.read_text().partition("<tbody>")[2]
    assert 'data-label="&lt;i&gt;goldfish&lt;/i&gt;, &#x27;x&#x27;" data-class="n01443537">' in body
    assert "&lt;/i&gt;, &#x27;x&#x27; <small>n01443537</small></span>" in body
    assert "<span>crane <small>&quot;&gt;&lt;b&gt;</small></span>" in body and "<b>" not in body


def odd_rows() -> list[PredictionWithPixels]:
    """Hostile names as path, as label and in reasons; sure, unsure, with no class at all, and errors."""
    rows = []
    for number, name in enumerate(ATTACKS):
        pixels = np.asarray(photo(56, 56, seed=number))
        best = (0.97, 0.31, 0.5)[number % 3]
        labels = (name, "tabby, tabby cat", "Old English sheepdog, bobtail", "数", "x")
        found = tuple(
            Prediction(class_id=i, label=label, probability=best if i == 0 else (1 - best) / 4)
            for i, label in enumerate(labels)
        )
        rows += [PredictionWithPixels(OkRow(path=name, predictions=found), pixels)]
        if number % 3 == 1:
            rows += [PredictionWithPixels(ErrorRow(path=name, error=f"damaged JPEG: {name}"), None)]
    return [
        *rows,
        PredictionWithPixels(OkRow(path="nothing sure.jpg", predictions=()), np.asarray(photo(56, 56, 9))),
    ]


@pytest.mark.slow
def test_gallery_shows_hostile_names_as_text_in_a_browser(
    bundle: Bundle, tmp_path: Path, browser: Callable[..., str]
) -> None:
    page, rows, backend = tmp_path / "odd.html", odd_rows(), OnnxBackend(bundle, "cpu")
    counter = RowCounter(backend)
    with open_gallery(page, bundle, counter) as gallery:
        for row in counter.count(rows):
            gallery.write(row)
    backend.close()
    document = browser(page.as_uri())
    assert "<title>Predictions of paper, fp32</title>" in document, "no script but ours has run"
    body = document.partition("<tbody>")[2].partition("</tbody>")[0]
    tags = Counter(re.findall(r"<([a-z]+)", body))
    bars = sum(len(seen.row.predictions) for seen in rows if isinstance(seen.row, OkRow))
    assert (tags["tr"], tags["td"], tags["img"]) == (13, 39, 10)
    assert (tags["div"], tags["i"], tags["span"]) == (bars + 3, bars, 2 * bars)
    assert set(tags) == {"tr", "td", "img", "div", "i", "span"}
    assert not re.findall(r"<[^>]*\son\w+=", re.sub(r'"[^"]*"', '""', body)), "no handler is an attribute"
    for control in ("\x1b", "\u202e", "\0"):
        assert control not in document
    assert "no class reaches the least probability" in body
    unsure = browser(f"{page.as_uri()}#below=40&sort=-probability")
    shown = re.findall(r'<tr data-n="\d+" data-p="([\d.]+)"[^>]*>', unsure)
    assert [p for p in shown if float(p) < 0.4] == ["0.310000"] * 3 + ["0"]
    assert "4 of 13 shown" in unsure
    for width in (500, 1200):
        assert_margins_are_empty(screenshot(browser, page, width))
