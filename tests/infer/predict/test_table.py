"""Rows as a table in a terminal: escaped, cut to its width, and with the reason of every error."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from data_pipeline.common.text import visible
from infer.predict.rows import ErrorRow, OkRow, Prediction, Row
from infer.predict.table import TableWriter, layout

ROWS: list[Row] = [
    OkRow(
        path="photos/holiday/2024/one.jpg",
        predictions=(
            Prediction(class_id=0, label="[bold]a very long label indeed", probability=0.987),
            Prediction(class_id=1, label="\x1b[31mred\u202e", probability=0.0126),
        ),
    ),
    ErrorRow(path="photos/[red]two\n.jpg", error="truncated JPEG: \x07 " + "and a long reason " * 5),
    OkRow(path="数.jpg", predictions=(Prediction(class_id=2, label="猫", probability=1.0),)),
]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_table_escapes_and_cuts_but_keeps_the_reason(width: int) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    writer = TableWriter(console, 2)
    for row in ROWS:
        writer.write(row)
    text = stream.getvalue()
    header, first, error, last = text.splitlines()
    assert header.split() == ["image", "#1", "#2"]
    for control in ("\x1b", "\x07", "\u202e", "\r"):
        assert control not in text
    assert "[bold]"[: width // 20] in first and "98.7%" in first and "1.3%" in first and "100.0%" in last
    assert "2024/one.jpg" in first and len(first) <= width
    assert "photos/[red]two\\n.jpg" in error and error.count("and a long reason") == 5 and "\\x07" in error
    assert visible("plain ü 数") == "plain ü 数"


def test_table_names_the_best_class_as_the_data_does() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=80, force_terminal=True, color_system=None)
    names = [("goldfish", "n01443537"), ("potter's wheel", "\x1b" + "folder" * 9)]
    writer = TableWriter(console, 2, label_cells=14, name_cells=9)
    for (label, name), other in zip(names, reversed(names), strict=True):
        best = Prediction(class_id=0, class_name=name, label=label, probability=0.75)
        rest = Prediction(class_id=1, class_name=other[1], label=other[0], probability=0.25)
        writer.write(OkRow(path="a.jpg", predictions=(best, rest)))
    writer.write(OkRow(path="b.jpg", predictions=()))
    header, first, second, none = stream.getvalue().splitlines()
    assert header.split() == ["image", "#1", "class", "#2"] and none.split() == ["b.jpg"]
    assert first.split() == ["a.jpg", "goldfish", "75.0%", "n01443537", "potter's", "wheel", "25.0%"]
    assert "75.0%  \\x1bfold…  goldfish" in second and len(first) <= 80
    assert first.index("n01443537") == header.index("class")


def test_table_shows_fewer_classes_on_narrow_terminals() -> None:
    assert [layout(width, 5)[2] for width in (20, 40, 60, 80)] == [1, 2, 3, 5]
    for width in (40, 80, 100, 200):
        path, cell, shown = layout(width, 5)
        assert path + shown * (cell + 2) <= width
