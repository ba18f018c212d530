"""The demo data: whole, balanced, split without overlap, and written once by however many processes."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.dataset import check_same_classes
from data_pipeline.datasets.demo import is_demo, write_demo
from data_pipeline.datasets.image_folder import load_image_folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by two callers at once."""
    root = tmp_path_factory.mktemp("data") / "new" / "demo"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_demo, [root, root]))
    return root


def test_demo_has_1797_digits_in_two_splits(demo: Path) -> None:
    train, val = load_image_folder(demo, "train"), load_image_folder(demo, "val")
    check_same_classes(train, val)
    assert train.classes == tuple("0123456789")
    assert (len(train), len(val)) == (1442, 355)
    assert np.bincount(val.labels).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    with Image.open(train.path_at(0)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
    assert [path.name for path in demo.parent.iterdir()] == ["demo"]


def test_demo_splits_share_no_image(demo: Path) -> None:
    def pixels(split: str) -> set[str]:
        files = (demo / split).glob("*/*.jpg")
        return {hashlib.sha256(np.asarray(Image.open(file)).tobytes()).hexdigest() for file in files}

    train, val = pixels("train"), pixels("val")
    assert len(train) == 1442 and len(val) == 355  # no scan is there twice, either
    assert not train & val


def test_demo_leaves_a_complete_folder_alone(demo: Path) -> None:
    file = demo / "train" / "0" / "0000.jpg"
    before = file.stat().st_mtime_ns
    write_demo(demo)
    assert file.stat().st_mtime_ns == before


def test_demo_refuses_a_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not the demo data"):
        write_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert not is_demo(tmp_path)


def test_demo_fills_an_empty_folder(tmp_path: Path) -> None:
    write_demo(tmp_path)
    assert is_demo(tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o755
