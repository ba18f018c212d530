"""The command of the studies."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from scripts.study.__main__ import DOCS, END, START, main
from scripts.study.runs import read_runs
from scripts.study.studies import DIGITS, STUDIES
from scripts.study.tables import make_table
from tests.scripts.study.test_tables import run_of


@pytest.mark.slow
def test_study_keeps_runs_and_redraws_table_and_picture(tmp_path: Path) -> None:
    lines = [msgspec.json.encode(run_of(setting, 0, [0.2, 0.8])) for setting in DIGITS.settings]
    (tmp_path / "study-digits.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "study-digits.md").write_text(f"before\n{START}old\n{END}\nafter\n")
    result = CliRunner().invoke(
        main, ["digits", "--seeds", "1", "--epochs", "2", "--out", str(tmp_path)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    text = (tmp_path / "study-digits.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| ranks | 1 rank | 0 | 80.0% |" in text
    assert (tmp_path / "study-digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_study_page_is_made_of_its_runs(name: str) -> None:
    study, runs = STUDIES[name], read_runs(DOCS / f"study-{name}.jsonl")
    if name != "digits" and not runs:
        assert "Not measured yet" in (DOCS / study.page).read_text()
        pytest.skip(f"not made yet: docs/{study.page} says so")
    assert {(r.setting, r.seed) for r in runs} == {(s, n) for s in study.settings for n in range(study.seeds)}
    assert make_table(study, runs) in (DOCS / study.page).read_text()


def test_every_needs_a_folder() -> None:
    result = CliRunner().invoke(main, ["tiny", "--every", "10"])
    assert result.exit_code == 2 and "--every chooses classes of --data" in result.output


def test_fine_tuning_needs_other_classes_as_well(tmp_path: Path) -> None:
    for options in (["--every", "2"], []):
        result = CliRunner().invoke(main, ["fine-tuning", "--data", str(tmp_path), *options])
        assert result.exit_code == 2 and "leave some with --every 4 or more" in result.output
