"""The studies: which settings answer which question, and on which data.

`digits` is about the demo's choices, `tiny` about those of recipe `tiny-imagenet-best`, `fine-tuning` about
what weights that were trained on other classes are worth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.datasets.open import open_dataset
from scripts.study.runs import SOURCE, Setting


@dataclass(frozen=True)
class Study:
    """One comparison.

    Attributes:
        recipe: that all settings change.
        questions: for each, its settings by the name that the table gives them. A setting may answer several.
        seeds: runs of each setting.
        epochs: of each run.
        mark: top-1 of interest: the table says in which epoch a run first passes it.
        axis: what top-1 is of, for the picture.
        page: the file with the table.
        source_epochs: of the run on other classes of the data that settings with `init_from=SOURCE` begin
            with; 0 where there are none.
    """

    recipe: str
    questions: Mapping[str, Mapping[str, Setting]]
    seeds: int
    epochs: int
    mark: float
    axis: str
    page: str
    source_epochs: int = 0

    @property
    def settings(self) -> list[Setting]:
        """Every setting once, however many questions it answers."""
        return list(dict.fromkeys(s for group in self.questions.values() for s in group.values()))


def _digits(model: str = "paper", init: str = "he", ranks: int = 2) -> Setting:
    return Setting((f"model.name={model}", f"model.init={init}"), ranks)


DIGITS = Study(
    recipe="demo",
    questions={
        "network": {name: _digits(model=name) for name in ("paper", "owt", "bn")},
        "initialisation": {name: _digits(init=name) for name in ("he", "paper", "caffe", "torch")},
        "ranks": {"1 rank": _digits(ranks=1), "2 ranks": _digits(ranks=2)},
    },
    seeds=3,
    epochs=8,
    mark=0.9,
    axis="top-1 of 355 held-out digits, %",
    page="study-digits.md",
)

TINY = Study(
    recipe="tiny-imagenet-best",
    questions={
        "one change": {
            "the recipe": Setting(()),
            "stem 11 × 11": Setting(("model.stem_kernel=11",)),
            "LRN, a fifth of the rate": Setting(
                ("model.norm=lrn", "model.hidden_norm=false", "schedule.learning_rate=0.02")
            ),
            "He's initialisation": Setting(("model.init=he",)),
        }
    },
    seeds=1,
    epochs=4,
    mark=0.2,
    axis="top-1 of 1,000 validation images, %",
    page="study-tiny.md",
)


def _tuned(*sets: str) -> Setting:
    return Setting(("epochs=2", f"init_from={SOURCE}", *sets))


FINE_TUNING = Study(
    recipe="tiny-imagenet",
    questions={
        "from scratch": {f"{n} epochs": Setting((f"epochs={n}",)) for n in (2, 5, 8)},
        "from other classes, 2 epochs": {
            "all layers": _tuned(),
            "head 10 times as fast": _tuned("head_rate=10"),
            "features frozen": _tuned("freeze=features"),
        },
    },
    seeds=3,
    epochs=2,
    mark=0.3,
    axis="top-1 of 500 validation images, %",
    page="fine-tuning.md",
    source_epochs=8,
)

STUDIES = {"digits": DIGITS, "tiny": TINY, "fine-tuning": FINE_TUNING}


def write_subset(data: Path, out: Path, every: int, first: int = 0) -> Path:
    """Write the images of every n-th class of a data folder, as they are, into another.

    Args:
        data: in any layout.
        out: a folder that does not have these classes.
        every, first: keep classes `first`, `first` + `every`, `first` + 2 · `every`, …
    Returns:
        `out`.
    """
    for split in ("train", "val"):
        dataset = open_dataset(data, split)
        for label in range(first, len(dataset.classes), every):
            folder = out / split / dataset.classes[label]
            folder.mkdir(parents=True)
            for index in np.flatnonzero(dataset.labels == label):
                (folder / Path(dataset.paths[int(index)]).name).write_bytes(dataset.read(int(index)))
    return out


def write_other_classes(data: Path, out: Path, every: int) -> Path:
    """Write three times as many classes as `write_subset` does, none of which it writes.

    Args:
        every: as there, at least 4.
    """
    for quarter in (1, 2, 3):
        write_subset(data, out, every, first=every * quarter // 4)
    return out
