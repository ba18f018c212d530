"""The whole report: well-formed, self-contained and escaped, with a word for what is not there."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper

from alexnet import main
from tests.helpers.infer_samples import write_tiny
from tests.helpers.report_samples import CLASSES, write_images, write_run

SECTIONS = [
    "summary", "curves", "filters", "predictions", "neighbours", "classes", "confusion", "mistakes",
    "configuration", "provenance", "speed",
]  # fmt: skip
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Parses a page; a tag that is not closed in order is an error."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.sections: dict[str, str] = {}
        self.alts: list[str] = []
        self._open: list[str] = []
        self._section = ""
        self.feed(self.source)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags[tag] += 1
        assert not [name for name in found if name.startswith("on")], found
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag == "section":
            self._section = found["id"] or ""
            assert self._section not in self.sections
            self.sections[self._section] = ""
        if tag == "img" or found.get("role") == "img":
            self.alts.append(found.get("alt") or found["aria-label"] or "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1  # only SVG has these

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self._section:
            self.sections[self._section] += data


def report(*options: str | Path) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, options)])


def check_page(path: Path, folder: Path) -> Page:
    page = Page(path)
    assert list(page.sections) == SECTIONS
    assert page.tags["script"] == 1 and page.tags["img"] == sum(a.startswith("data:") for a in page.addresses)
    inside = [address for address in page.addresses if not address.startswith("data:image/")]
    assert inside == [f"#{key}" for key in SECTIONS], "only the table of contents leads anywhere"
    assert "http" not in page.source.replace("http-equiv", "") and "url(" not in page.source
    assert str(folder) not in page.source, "no folder of the machine"
    assert all(page.alts) and all(body.strip() for body in page.sections.values())
    return page


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "odd-1", data)


@pytest.fixture(scope="module")
def whole(run: Path) -> Path:
    """The report of the whole run, beside it."""
    output = run.parent / "whole.html"
    result = report(run, "--output", output)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{output}\n" and "images: 13/13" in result.stderr
    return output


def test_the_page_is_whole_and_escaped(whole: Path, run: Path, data: Path) -> None:
    page = check_page(whole, data)
    assert str(run) not in page.source and whole.stat().st_size < 1e6
    assert CLASSES[1] in page.sections["classes"] and "<script>a" not in page.source
    assert "<i>odd" in page.sections["summary"] and "<i>odd" not in page.source
    wrong = len(re.findall('class="pair"', page.source))
    cards = min(5, 12 - wrong) + min(3, wrong)
    # the filters, pictures with bars, 5 queries with 5 neighbours each, and each mistake twice
    assert 0 < wrong < 12 and page.tags["img"] == 1 + cards + 5 * 6 + 2 * wrong
    assert page.tags["svg"] == 5, "four charts and the confusion matrix"


def test_the_page_says_what_it_shows(whole: Path) -> None:
    shown = Page(whole).sections
    assert "top-1 50.0%, top-5 100.0% of 12 images, epoch 2" in shown["summary"]
    assert "Looked at: 12 of 13 validation images, 1 could not be read" in shown["predictions"]
    assert "Counted over 12 images of the validation split at step 20." in shown["classes"]
    assert "75.0% of 4" in shown["classes"], "the top-1 of one class"
    assert "Grad-CAM (Selvaraju et al. 2017)" in shown["mistakes"] and "2 × 2 cells" not in shown["summary"]
    assert "recipe <i>odd does not ship" in shown["configuration"]
    assert "model.hidden_units409616" in shown["configuration"]
    assert "data.rootnone…/shapes" in shown["configuration"]
    assert "training, median of 10 rows111 images/s" in shown["speed"]


def test_the_same_run_gives_the_same_page(whole: Path, run: Path) -> None:
    assert report(run).stdout == f"{run.resolve() / 'report.html'}\n"
    assert (run / "report.html").read_bytes() == whole.read_bytes()


def test_what_is_gone_is_said_in_its_place(run: Path, data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    data.rename(data.with_name("moved"))
    try:
        assert report(copy).exit_code == 0
        page = check_page(copy / "report.html", data)
        assert report(copy, "--data", data).exit_code == 2, "data that was named must be there"
    finally:
        data.with_name("moved").rename(data)
    assert "Not shown: no data folder …/shapes" in page.sections["predictions"]
    assert "val/x/<u>.png" in page.sections["mistakes"] and page.tags["svg"] == 5
    for name in ("metrics.jsonl", "confusion.csv"):
        (copy / name).unlink()
    shutil.rmtree(copy / "checkpoints")
    assert report(copy).exit_code == 0, "an earlier report is replaced"
    page = check_page(copy / "report.html", data)
    assert (
        "metrics.jsonl is gone" in page.sections["curves"] and "Not counted yet" in page.sections["confusion"]
    )
    assert "no checkpoint that can be used" in page.sections["filters"] and page.tags["img"] == 0


def test_tables_of_a_later_evaluation_are_named_so(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints")))
    table = copy / "confusion.csv"
    table.write_text(table.read_text().replace("3,0,1", "0,0,4"))
    assert report(copy).exit_code == 0
    shown = Page(copy / "report.html").sections
    assert "by a later evaluation" in shown["classes"] and "100.0% of 4" in shown["classes"]


def test_wrong_use_is_one_line(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "mine.html"
    other.write_text("<p>mine</p>")
    for options, said in (
        ((tmp_path,), "is neither a run nor an export"),
        ((tmp_path / "no",), "does not exist"),
        ((run, "--output", other), "exists and is not a report"),
        ((run, "--output", tmp_path / "page.txt"), "must end in .html"),
        ((run, "--output", tmp_path / "no" / "page.html"), "there is no folder"),
    ):
        result = report(*options)
        assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1, said
    assert other.read_text() == "<p>mine</p>"


def test_an_export_without_its_run_shows_what_it_has(tmp_path: Path) -> None:
    weights = numpy_helper.from_array(np.random.default_rng(0).normal(size=(4, 3, 5, 5)).astype("f4"), "w")
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    graph = helper.make_graph([conv], "g", [], [], [weights])
    alone = write_tiny(tmp_path / "alone", content=helper.make_model(graph).SerializeToString())
    assert report(alone, "--output", tmp_path / "page.html").exit_code == 0
    page = check_page(tmp_path / "page.html", tmp_path)
    assert report(alone, "--data", tmp_path).exit_code == 2, "there is no checkpoint for the pictures"
    assert page.tags["img"] == 1 and "4 filters of 5 × 5 × 3" in page.sections["filters"]
    assert "from model.onnx" in page.sections["filters"]
    assert "does not lie in its run" in page.sections["mistakes"] and "gate: 50 of" in page.sections["speed"]


def test_the_page_opens_in_a_browser(whole: Path, browser: Callable[..., str]) -> None:
    document = browser(whole.as_uri())
    assert "<title>AlexNet report: odd-1</title>" in document, "no script but ours has run"
    assert document.count('<th scope="col"><button type="button">') == 7 + 4, "its script has"
    assert [key for key in SECTIONS if f'<section id="{key}">' in document] == SECTIONS
