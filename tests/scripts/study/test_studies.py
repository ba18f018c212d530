"""The studies, and the subset of the data that one may use."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.datasets.open import open_dataset
from scripts.study.studies import DIGITS, STUDIES, TINY, write_other_classes, write_subset
from train.config.load import make_config


def test_digits_runs_each_setting_once() -> None:
    assert len(DIGITS.settings) == len(set(DIGITS.settings)) == 7
    assert {s.ranks for s in DIGITS.settings} == {1, 2}


def test_settings_are_those_of_the_recipe_but_one_change() -> None:
    for study in STUDIES.values():
        for setting in study.settings:
            assert make_config(study.recipe, setting.sets).recipe == study.recipe
    assert len(TINY.settings) <= 8
    assert [s.sets for s in TINY.settings].count(()) == 1


def test_subset_has_every_nth_class_byte_for_byte(demo_data: Path, tmp_path: Path) -> None:
    subset = write_subset(demo_data, tmp_path / "subset", 5)
    for split in ("train", "val"):
        whole, part = open_dataset(demo_data, split), open_dataset(subset, split)
        assert part.classes == ("0", "5")
        kept = [i for i in range(len(whole)) if whole.labels[i] in (0, 5)]
        assert [part.read(i) for i in range(len(part))] == [whole.read(i) for i in kept]


@pytest.mark.slow
def test_other_classes_are_none_of_the_subset(demo_data: Path, tmp_path: Path) -> None:
    chosen = open_dataset(write_subset(demo_data, tmp_path / "chosen", 5), "val").classes
    others = open_dataset(write_other_classes(demo_data, tmp_path / "others", 5), "val").classes
    assert (chosen, others) == (("0", "5"), ("1", "2", "3", "6", "7", "8"))
