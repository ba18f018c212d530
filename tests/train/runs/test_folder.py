"""Run folders and their rows."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.checkpoint_samples import row
from train.config.load import make_config
from train.runs.folder import create_run


def test_later_rows_and_half_a_line_are_dropped(tmp_path: Path) -> None:
    folder = create_run(tmp_path, make_config("demo"))
    for step in (1, 2, 3):
        folder.append(row(step))
    with folder.metrics.open("ab") as file:
        file.write(b'{"split":"train","ep')
    assert folder.drop_rows_after(2) == 2
    assert folder.metrics.read_bytes().count(b"\n") == 2
    assert folder.drop_rows_after(2) == 0


def test_run_folders_of_one_second_are_distinct(tmp_path: Path) -> None:
    config = make_config("demo")
    folders = {create_run(tmp_path, config).path for _ in range(3)}
    assert len(folders) == 3
