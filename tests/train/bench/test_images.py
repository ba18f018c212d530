"""The images of benchmarks: written to a folder of their own, and never among somebody's data."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from train.bench import images
from train.bench.images import link_bench_images, write_bench_images


def test_bench_images_and_links_stay_out_of_other_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "FOLDER", tmp_path / "kept")
    mine = tmp_path / "mine"
    (mine / "train" / "class-0000").mkdir(parents=True)
    names = [f"train/class-{n:04d}/{n}.jpg" for n in range(4)]
    with pytest.raises(UserError, match="mine exists and holds no links of a benchmark: give a new folder"):
        link_bench_images(mine, names, 4, 2)
    with pytest.raises(UserError, match="mine exists and does not hold 2 synthetic images"):
        write_bench_images(mine, 2)
    assert [path.name for path in mine.rglob("*")] == ["train", "class-0000"]
    for _ in range(2):  # the second time after a kill
        link_bench_images(tmp_path / "new", names, 4, 2)
        assert sum(1 for _ in (tmp_path / "new").glob("train/*/*.jpg")) == 4
        (tmp_path / "new" / "complete.txt").unlink()
