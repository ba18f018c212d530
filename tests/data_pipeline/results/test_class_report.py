"""A classifier's errors, from the counts to the report: by hand and by scikit-learn."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.results.class_report import (
    NUM_MISTAKES,
    ClassCounts,
    Mistake,
    check_csv_folder,
    describe_report,
    make_class_report,
    rank_mistakes,
    write_csv,
)

NAMES = ("n01", "n02", "n03")
COUNTS = ClassCounts(np.array([[6, 2, 0], [1, 1, 0], [0, 0, 0]]), np.array([8, 2, 0]))


def test_report_by_hand() -> None:
    report = make_class_report(COUNTS, NAMES, ("cat", "dog", "n03"))
    cat, dog, none = report.classes
    assert (cat.num_samples, cat.num_predicted, cat.top1, cat.precision, cat.f1) == (8, 7, 0.75, 6 / 7, 0.8)
    assert (dog.top1, dog.top5, dog.precision, dog.f1) == (0.5, 1.0, 1 / 3, 0.4)
    # a class without images, and never predicted: no figure, and not part of the macro average
    assert (none.num_samples, none.top1, none.top5, none.precision, none.f1) == (0, None, None, None, None)
    assert report.macro.top1 == 0.625 and report.macro.f1 == pytest.approx(0.6)
    assert (report.micro.top1, report.micro.top5) == (0.7, 1.0)
    assert [(c.truth, c.predicted, c.count, c.share) for c in report.confusions] == [
        ("n01", "n02", 2, 0.25),
        ("n02", "n01", 1, 0.5),
    ]
    assert describe_report(report) == [
        "lowest top-1: dog (n02) 50.0% of 2, cat (n01) 75.0% of 8",
        "most often taken: cat (n01) for dog (n02) (2, 25.0%), dog (n02) for cat (n01) (1, 50.0%)",
    ]


@pytest.mark.slow
def test_report_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 7, (2, 500))
    confusion = np.zeros((7, 7), dtype=np.int64)
    np.add.at(confusion, (truth, found), 1)
    report = make_class_report(
        ClassCounts(confusion, np.diagonal(confusion)), tuple("abcdefg"), tuple("abcdefg")
    )
    from sklearn.metrics import precision_recall_fscore_support  # 5 s: only where it is used

    precision, recall, f1, support = precision_recall_fscore_support(truth, found)
    assert [row.precision for row in report.classes] == pytest.approx(precision)
    assert [row.top1 for row in report.classes] == pytest.approx(recall)
    assert [row.f1 for row in report.classes] == pytest.approx(f1)
    assert [row.num_samples for row in report.classes] == support.tolist()


def test_equal_mistakes_are_in_the_order_of_the_split() -> None:
    shared = [(0.50001, 7, 0, 1), (0.9, 3, 1, 0), (0.50002, 4, 0, 1)]
    expected = [(0.9, 3, 1, 0), (0.5, 4, 0, 1), (0.5, 7, 0, 1)]
    assert rank_mistakes(shared) == rank_mistakes(shared[::-1]) == expected
    assert len(rank_mistakes([(0.1, index, 0, 1) for index in range(50)])) == NUM_MISTAKES


def test_csv_is_read_back_and_never_replaces_others(tmp_path: Path) -> None:
    mistake = Mistake(path='val/a, "b".jpg', truth="n01", predicted="n02", probability=0.9)
    folder = tmp_path / "tables"
    check_csv_folder(folder, "--csv")
    write_csv(folder, COUNTS, make_class_report(COUNTS, NAMES, NAMES, [mistake]))
    classes, confusion, mistakes = (
        list(csv.reader((folder / f"{name}.csv").read_text().splitlines()))
        for name in ("classes", "confusion", "mistakes")
    )
    assert classes[1] == ["n01", "n01", "8", "7", "0.75", "1.0", str(6 / 7), "0.8"]
    assert classes[3][4:] == ["", "", "", ""] and classes[5][:2] == ["(micro)", "(micro)"]
    assert confusion == [
        ["truth \\ predicted", *NAMES],
        ["n01", "6", "2", "0"],
        ["n02", "1", "1", "0"],
        ["n03", "0", "0", "0"],
    ]
    assert mistakes[1] == ['val/a, "b".jpg', "n01", "n02", "0.9"]
    check_csv_folder(folder, "--csv")  # ours: may be replaced
    (folder / "classes.csv").write_text("name;notes\n")
    with pytest.raises(UserError, match=r"classes\.csv"):
        check_csv_folder(folder, "--csv")
