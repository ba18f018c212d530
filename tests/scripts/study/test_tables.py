"""Tables of the study, from its runs."""

from __future__ import annotations

from scripts.study.runs import Epoch, Run, Setting
from scripts.study.studies import DIGITS
from scripts.study.tables import first_epoch_above, make_table


def run_of(setting: Setting, seed: int, top1: list[float], ended: str = "") -> Run:
    epochs = [Epoch(number, 1.0, value, 1.0) for number, value in enumerate(top1, start=1)]
    return Run(setting, seed, epochs, ended, 60.0)


def test_table_has_means_ranges_and_early_ends() -> None:
    usual, torchs = (DIGITS.questions["initialisation"][name] for name in ("he", "torch"))
    runs = [run_of(usual, seed, [0.5, last]) for seed, last in enumerate((0.9, 0.94, 0.92))]
    runs.append(run_of(torchs, 0, [0.1], "the training loss has been flat"))
    table = make_table(DIGITS, runs)
    spread = "92.0% (90.0 to 94.0)"
    assert (
        f"| network | paper | 0, 1, 2 | {spread} | 100.0% (100.0 to 100.0) | {spread} | 2, 2, 2 | 1.0 |"
        in table
    )
    assert "| initialisation | torch | 0 | - | - | - | never | 1.0 | 1 of 1, flat, in epoch 1 |" in table
    assert "4 runs of 2 epochs at most, 4 minutes together." in table
    assert first_epoch_above(runs[0], 0.5) == 1 and first_epoch_above(runs[0], 0.95) is None
