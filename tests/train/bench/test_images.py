"""The images of benchmarks: written to a folder of their own, and never among somebody's data."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    with pytest.raises(
        UserError, match=r"mine exists and does not hold 4 links to 2 parts of photographs: g"
    ):
        link_bench_images(mine, names, 4, 2)
    with pytest.raises(
        UserError, match="mine exists and does not hold 2 parts of photographs, 500 x 375 pixels"
    ):
        write_bench_images(mine, 2)
    assert [path.name for path in mine.rglob("*")] == ["train", "class-0000"]
    assert not (tmp_path / "kept").exists()
    two = write_bench_images(tmp_path / "two", 2)
    with pytest.raises(UserError, match="two exists and does not hold 3 parts of photographs"):
        write_bench_images(two, 3)
    (two / "bench-images.txt").write_text("2 synthetic images for benchmarks\n")  # what it once was
    with pytest.raises(UserError, match="two exists and does not hold 2 parts of photographs"):
        write_bench_images(two, 2)


def test_bench_links_go_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FOLDER", tmp_path / "kept")
    new, names = tmp_path / "new", [f"train/class-{n:04d}/{n}.jpg" for n in range(4)]
    link_bench_images(new, names, 4, 2)
    assert [(new / name).stat().st_nlink for name in names] == [3] * 4
    assert (new / names[1]).samefile(new / names[3]) and not (new / names[0]).samefile(new / names[1])
    (new / names[2]).unlink()
    link_bench_images(new, names, 4, 2)  # all are there, as far as it knows
    assert not (new / names[2]).exists()
    (new / "complete.txt").unlink()
    link_bench_images(new, names, 4, 2)
    assert (new / names[2]).samefile(new / names[0])


def test_bench_images_go_on_after_a_kill(tmp_path: Path) -> None:
    root = write_bench_images(tmp_path / "images", 3)
    files = sorted(root.rglob("*.jpg"))
    assert [f"{file.relative_to(root)}" for file in files] == [
        "train/class-0/00000.jpg",
        "train/class-1/00001.jpg",
        "train/class-2/00002.jpg",
    ]
    whole, before = files[1].read_bytes(), files[0].stat().st_mtime_ns
    (root / "complete.txt").unlink()
    files[1].rename(files[1].with_suffix(".part"))
    os.truncate(files[1].with_suffix(".part"), 100)  # killed while it wrote the second
    write_bench_images(root, 3)
    assert files[1].read_bytes() == whole and files[0].stat().st_mtime_ns == before
    assert sorted(root.rglob("*.*")) == sorted([*files, root / "bench-images.txt", root / "complete.txt"])


@pytest.mark.slow
def test_bench_images_are_unlike_and_of_the_sizes_asked_for(tmp_path: Path) -> None:
    files = sorted(write_bench_images(tmp_path / "large", 40).rglob("*.jpg"))
    sizes = []
    for file in files:
        with Image.open(file) as image:
            sizes.append(image.size)
    upright = [size[::-1] for size in sizes if size[0] < size[1]]
    assert 3 <= len(upright) <= 17 and len(set(sizes)) > 30
    for width, height in [*upright, *(size for size in sizes if size[0] > size[1])]:
        assert 450 <= width <= 550 and 337 <= height <= 413
    assert 70_000 < np.mean([file.stat().st_size for file in files]) < 110_000
    pixels = []
    for file in write_bench_images(tmp_path / "small", 40, sides=(64, 64), spread=0.0).rglob("*.jpg"):
        with Image.open(file) as image:
            assert image.size == (64, 64) and image.mode == "RGB"
            pixels.append(np.asarray(image, np.float64))
    differences = [np.abs(a - b).mean() for i, a in enumerate(pixels) for b in pixels[:i]]
    assert min(differences) > 8
