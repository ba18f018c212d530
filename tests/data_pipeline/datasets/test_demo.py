"""The demo data: whole, balanced, split without overlap, and written once by however many processes."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.common.errors import UserError
from data_pipeline.datasets import demo
from data_pipeline.datasets.dataset import check_same_classes
from data_pipeline.datasets.demo import is_demo, read_photographs, write_demo
from data_pipeline.datasets.image_folder import load_image_folder


def test_demo_has_1797_digits_in_two_splits(demo_data: Path) -> None:
    train, val = load_image_folder(demo_data, "train"), load_image_folder(demo_data, "val")
    check_same_classes(train, val)
    assert train.classes == tuple("0123456789")
    assert (len(train), len(val)) == (1442, 355)
    assert np.bincount(val.labels).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    with Image.open(train.path_at(0)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))


def test_demo_splits_share_no_image(demo_data: Path) -> None:
    def pixels(split: str) -> set[str]:
        files = (demo_data / split).glob("*/*.jpg")
        return {hashlib.sha256(np.asarray(Image.open(file)).tobytes()).hexdigest() for file in files}

    train, val = pixels("train"), pixels("val")
    assert len(train) == 1442 and len(val) == 355  # no scan is there twice, either
    assert not train & val


def test_demo_leaves_a_complete_folder_alone(demo_data: Path) -> None:
    file = demo_data / "train" / "0" / "0000.jpg"
    before = file.stat().st_mtime_ns
    write_demo(demo_data)
    assert file.stat().st_mtime_ns == before


def test_demo_refuses_a_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not the demo data"):
        write_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert not is_demo(tmp_path)


@pytest.mark.slow
def test_two_callers_fill_an_empty_folder_once(demo_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "new" / "demo"
    root.mkdir(parents=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write_demo, [root, root]))
    assert is_demo(root) and root.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in root.parent.iterdir()] == ["demo"]
    for file in demo_data.glob("*/*/*.jpg"):
        assert (root / file.relative_to(demo_data)).read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_shipped_images_are_those_that_scikit_learn_gives() -> None:
    from sklearn.datasets import load_digits, load_sample_image  # 4 s: only where it is used

    digits, (levels, labels) = load_digits(), demo._read_digits()
    assert np.array_equal(levels, digits.images) and np.array_equal(labels, digits.target)
    for name, image in read_photographs().items():
        assert np.array_equal(np.asarray(image), load_sample_image(name))


def test_photographs_need_scikit_learn_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs = read_photographs()
    assert [(name, image.mode, image.size) for name, image in photographs.items()] == [
        ("china.jpg", "RGB", (640, 427)), ("flower.jpg", "RGB", (640, 427)),
    ]  # fmt: skip
    monkeypatch.setattr("data_pipeline.datasets.demo.find_spec", lambda name: None)
    advice = r"with scikit-learn, which is not installed: pip install 'alexnet\[train\]'$"
    with pytest.raises(UserError, match=f"the photographs come {advice}"):
        read_photographs.__wrapped__()
    with pytest.raises(UserError, match=f"the demo data comes {advice}"):
        write_demo(tmp_path / "demo")
    assert not any(tmp_path.iterdir())
