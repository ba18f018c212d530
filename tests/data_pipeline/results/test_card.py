"""Parts of model cards: names that break neither Markdown nor YAML."""

from __future__ import annotations

import pytest
import yaml
from markdown_it import MarkdownIt

from data_pipeline.results.card import code, codes, front_matter, table

HOSTILE = [
    "a`b", "``", "`", "a|b", "<script>alert(1)</script>", "[x](javascript:1)", "![x](http://x)", "# h",
    "**b**", "two\nlines", "tab\t", "nul\x00", "caf\udce9", "\u202erevo", "http://x.example", "&amp;", "---",
    " ", "", "a`|`b", "\\", "\\`", "emoji \U0001f600", "'", '"', "{}", "%TAG",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_one_code_span_also_in_a_table(name: str) -> None:
    parser = MarkdownIt("commonmark").enable("table")
    paragraph = parser.parse(f"before {code(name)} after")
    assert [token.type for token in paragraph] == ["paragraph_open", "inline", "paragraph_close"]
    kinds = [token.type for token in paragraph[1].children or []]
    assert kinds == (["text", "code_inline", "text"] if name.strip() else ["text"])
    cells = parser.parse(table(("a", "b"), [(code(name, in_table=True), "x")]))
    inner = [token.children or [] for token in cells if token.type == "inline"]
    assert [[child.type for child in part] for part in inner[2:]] == [kinds[1:-1] or ["text"], ["text"]]
    if name == "a`|`b":
        assert inner[2][0].content == name


@pytest.mark.parametrize("name", HOSTILE)
def test_front_matter_is_yaml_whatever_the_names(name: str) -> None:
    text = front_matter(name, name, {"top-1": 1 / 3, "top-5": 1e-5})
    assert text.startswith("---\n") and text.endswith("\n---\n")
    found = yaml.safe_load(text.removeprefix("---\n").removesuffix("---\n"))
    (entry,) = found["model-index"]
    (result,) = entry["results"]
    assert found["license"] == "other" and found["tags"][0] == "alexnet"
    assert entry["name"] == result["dataset"]["name"]
    if name.isprintable() and name.isascii():
        assert entry["name"] == name
    assert [metric["value"] for metric in result["metrics"]] == [0.333333, 0.00001]
    assert "model-index" not in front_matter(name, name, {})


def test_many_classes_are_counted() -> None:
    assert codes(["a", "b"]) == "`a`, `b`"
    assert codes([str(i) for i in range(1020)]).endswith("`19` and 1,000 more")
