"""Layouts are detected; data that would give chance accuracy is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.open import open_dataset, open_recorded, splits_of
from tests.helpers.images import write_folder
from tests.helpers.layouts import CRANES, JPEG, SYNSET_IDS, WORDS, make_imagenet, make_tiny


def answers(root: Path, split: str = "val") -> dict[str, str]:
    """The class of each image, by the image's own name."""
    dataset = open_dataset(root, split)
    return {
        Path(path).name: dataset.classes[label]
        for path, label in zip(dataset.paths, dataset.labels.tolist(), strict=True)
    }


def test_tiny_imagenet_opens_as_distributed(tmp_path: Path) -> None:
    root = make_tiny(tmp_path)
    train, val = open_dataset(root, "train"), open_dataset(root, "val")
    assert train.classes == val.classes == SYNSET_IDS
    assert train.class_labels == val.class_labels
    assert val.labels_text == (
        "goldfish",
        "European fire salamander",
        "crane (n02012849)",
        "crane (n03126707)",
    )
    assert train.paths[0] == "n01443537/images/n01443537_0.JPEG" and len(train) == 12
    assert answers(root) == {f"val_{n}.JPEG": SYNSET_IDS[-1 - n % 4] for n in range(8)}
    assert val.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert val.name_at(0) == "val/images/val_3.JPEG" and val.read(0) == JPEG
    assert splits_of(root) == ("train", "val")
    with pytest.raises(UserError, match="no file says which is of which class, so accuracy would be chance"):
        open_dataset(root, "test")


def test_label_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    root = make_tiny(tmp_path)
    want, labels = answers(root), open_dataset(root, "val").labels_text
    for name in ("words.txt", "wnids.txt", "val/val_annotations.txt"):
        content = (root / name).read_bytes()
        (root / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert answers(root) == want and open_dataset(root, "val").labels_text == labels
    assert open_dataset(root, "val").classes == SYNSET_IDS
    (root / "words.txt").write_bytes((root / "words.txt").read_bytes().decode("utf-8-sig").encode("utf-16"))
    with pytest.raises(UserError, match=r"words.txt is text in UTF-16: save it as UTF-8"):
        open_dataset(root, "val")


def test_imagenet_takes_labels_from_a_list_of_names(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path)
    with pytest.raises(UserError, match=r"side by side.* chance: expected .* or add .*val"):
        open_dataset(root, "val")
    names = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in range(1, 9)]
    want = {name: SYNSET_IDS[(3 * n) % 4] for n, name in enumerate(names)}
    (root / "val.txt").write_text("".join(f"{name} {synset_id}\n" for name, synset_id in want.items()))
    assert answers(root) == want
    (root / "val.txt").write_text("".join(f"val/{name} {SYNSET_IDS.index(w)}\n" for name, w in want.items()))
    assert answers(root) == want  # Caffe's, by number
    (root / "val.txt").write_text("".join(f"{name} {SYNSET_IDS.index(w) + 1}\n" for name, w in want.items()))
    with pytest.raises(UserError, match="numbers classes up to 4 and there are 4: count from 0"):
        open_dataset(root, "val")


def test_imagenet_takes_labels_from_kaggles_table(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path)
    want = {f"ILSVRC2012_val_{n:08d}.JPEG": SYNSET_IDS[n % 4] for n in range(1, 9)}
    rows = "".join(
        f"{name[:-5]},{synset_id} 1 2 3 4 {synset_id} 5 6 7 8\n" for name, synset_id in want.items()
    )
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + rows)
    (root / "LOC_synset_mapping.txt").write_text((WORDS + CRANES).replace("\t", " "))
    assert answers(root) == want
    assert open_dataset(root, "train").labels_text[0] == "goldfish"


def test_imagenet_takes_labels_from_the_devkit(tmp_path: Path) -> None:
    root = make_imagenet(tmp_path)
    devkit = root / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n4\n3\n2\n1\n4\n3\n")
    with pytest.raises(UserError, match=r"no .*meta.mat: it says which class each number"):
        open_dataset(root, "val")
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    numbered = (SYNSET_IDS[3], SYNSET_IDS[2], SYNSET_IDS[1], SYNSET_IDS[0])  # the devkit's own order
    rows = [(n, synset_id, "words", 0) for n, synset_id in enumerate(numbered, 1)] + [
        (5, "n00001740", "entity", 4)
    ]
    savemat(devkit / "meta.mat", {"synsets": np.array(rows, dtype=kind)})
    by_number = [numbered[n - 1] for n in (2, 1, 4, 3, 2, 1, 4, 3)]
    assert answers(root) == {f"ILSVRC2012_val_{n:08d}.JPEG": w for n, w in enumerate(by_number, 1)}
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n5\n")
    with pytest.raises(UserError, match=r"line 3: '5' is no class number of meta.mat"):
        open_dataset(root, "val")


def test_labels_that_do_not_match_the_images_are_refused(tmp_path: Path) -> None:
    root = make_tiny(tmp_path)
    table = root / "val" / "val_annotations.txt"
    whole = table.read_text()
    for text, reason in {
        whole.split("\n", 1)[
            1
        ]: r"1 of 8 images in .* have no line in .*val_annotations.txt \(the first: val_0",
        whole + "val_8.JPEG\tn01443537\n": r"names 1 images that are not in .* \(the first: val_8.JPEG\)",
        whole.replace(SYNSET_IDS[0], "n9"): r"names 1 classes that train/ does not have \(the first: n9\)",
        whole + "oops\n": "line 9: expected an image's name and its class",
    }.items():
        table.write_text(text)
        with pytest.raises(UserError, match=reason):
            open_dataset(root, "val")
    table.write_text(whole)
    (root / "wnids.txt").write_text("\n".join((*SYNSET_IDS, "n5")))
    with pytest.raises(UserError, match=r"are not those of wnids.txt \(4 and 5, first difference n5\)"):
        open_dataset(root, "val")


def test_opening_a_split_checks_its_name_and_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    write_folder(tmp_path / "val", {"a": 1, "c": 1})
    assert open_dataset(tmp_path, "train").classes == ("a", "b")
    with pytest.raises(UserError, match="only in train: b; only in val: c"):
        open_dataset(tmp_path, "val")
    with pytest.raises(UserError, match=r"'../x' is not the name of a split"):
        open_dataset(tmp_path, "../x")
    with pytest.raises(UserError, match="neither train nor val"):
        splits_of(tmp_path / "train")


def test_recorded_data_that_is_gone_names_the_option(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", {"a": 1, "b": 1})
    assert open_recorded(tmp_path, "train").classes == ("a", "b")
    with pytest.raises(
        UserError, match=r"no data folder .*old: .*; if the data is elsewhere now, .* --data DIR"
    ):
        open_recorded(tmp_path / "old", "train")
    (tmp_path / "mount").mkdir()  # what is left where a disk was
    with pytest.raises(
        UserError, match=r"no folder 'train' in .*; if the data is elsewhere now, .* --other DIR"
    ):
        open_recorded(tmp_path / "mount", "train", "--other")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot learn from [^;]*; expected [^;]*$"):
        open_recorded(tmp_path / "empty", "train")
