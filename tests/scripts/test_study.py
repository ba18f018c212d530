"""The study: what it makes of its runs."""

from __future__ import annotations

from pathlib import Path

import msgspec
from click.testing import CliRunner

from scripts import study
from scripts.study import Epoch, Run, Setting, first_epoch_above, make_table, settings


def run_of(setting: Setting, seed: int, top1: list[float], ended: str = "") -> Run:
    epochs = [Epoch(number, 1.0, value, 1.0) for number, value in enumerate(top1, start=1)]
    return Run(setting, seed, epochs, ended, 60.0)


def test_study_runs_each_setting_once() -> None:
    assert len(settings()) == len(set(settings())) == 7
    assert {s.model for s in settings()} == {"paper", "owt", "bn"}
    assert {s.init for s in settings()} == {"he", "paper", "caffe", "torch"} and {
        s.ranks for s in settings()
    } == {1, 2}


def test_study_table_has_means_ranges_and_early_ends() -> None:
    usual = study.USUAL
    runs = [run_of(usual, seed, [0.5, last]) for seed, last in enumerate((0.9, 0.94, 0.92))]
    runs.append(run_of(Setting("paper", "torch", 2), 0, [0.1], "the training loss has been flat"))
    table = make_table(runs, 2)
    assert "| network | paper | 3 | 92.0% (90.0 to 94.0) | 92.0% | 2, 2, 2 | none |" in table
    assert "| initialisation | torch | 1 | - | - | never | 1 of 1, flat, in epoch 1 |" in table
    assert "4 runs of 2 epochs at most, 4 minutes together." in table
    assert first_epoch_above(runs[0], 0.5) == 1 and first_epoch_above(runs[0], 0.95) is None


def test_study_keeps_runs_and_redraws_table_and_picture(tmp_path: Path) -> None:
    lines = [msgspec.json.encode(run_of(setting, 0, [0.2, 0.8])) for setting in settings()]
    (tmp_path / "study.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "study.md").write_text(f"before\n{study.START}old\n{study.END}\nafter\n")
    result = CliRunner().invoke(study.main, ["--seeds", "1", "--epochs", "2", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "study.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| ranks | 1 rank | 1 | 80.0% (80.0 to 80.0)" in text
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_study_page_is_made_of_its_runs() -> None:
    runs = study.read_runs(study.DOCS / "study.jsonl")
    assert {(run.setting, run.seed) for run in runs} == {(s, seed) for s in settings() for seed in range(3)}
    assert make_table(runs, 8) in (study.DOCS / "study.md").read_text()
