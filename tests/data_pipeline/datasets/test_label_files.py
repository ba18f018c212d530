"""Names of classes for people, from the files that Tiny ImageNet and ImageNet ship, and from damaged ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.datasets import label_files
from data_pipeline.datasets.index_cache import Watch
from data_pipeline.datasets.label_files import read_class_names

# Lines of Tiny ImageNet's words.txt, and two of ImageNet's LOC_synset_mapping.txt, as they are distributed.
TINY = """\
n00001740\tentity
n01443537\tgoldfish, Carassius auratus
n01629819\tEuropean fire salamander, Salamandra salamandra
n02012849\tcrane
n02268443\tdragonfly, darning needle, devil's darning needle, sewing needle, snake feeder, snake doctor, \
mosquito hawk, skeeter hawk
n03126707\tcrane
n03970156\tplunger, plumber's helper
n03992509\tpotter's wheel
"""
KAGGLE = "n01440764 tench, Tinca tinca\nn03710637 maillot\nn03710721 maillot, tank suit\n"


def names(root: Path, *classes: str, file: str = "words.txt", text: str | bytes = TINY) -> tuple[str, ...]:
    (root / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_class_names(root, classes, Watch(root))


def test_classes_of_tiny_imagenet_get_their_first_names(tmp_path: Path) -> None:
    ids = ("n01443537", "n01629819", "n02268443", "n03970156", "n03992509")
    want = ("goldfish", "European fire salamander", "dragonfly", "plunger", "potter's wheel")
    assert names(tmp_path, *ids) == want
    # one crane is enough of a name where there is no other; a class without a line keeps its own name
    assert names(tmp_path, "n02012849", "n99999999") == ("crane", "n99999999")
    assert names(tmp_path, "n02012849", "n03126707") == ("crane (n02012849)", "crane (n03126707)")
    assert names(tmp_path, "cat", "dog") == ()


def test_classes_of_imagenet_get_the_next_synonym_if_needed(tmp_path: Path) -> None:
    ids = ("n01440764", "n03710637", "n03710721")
    found = names(tmp_path, *ids, file="LOC_synset_mapping.txt", text=KAGGLE)
    assert found == ("tench", "maillot", "maillot, tank suit")
    lines = "a\tjay, bird, blue\nb\tjay, bird, grey\nc\tjay, letter\n"
    assert names(tmp_path, "a", "b", "c", text=lines) == ("jay, bird, blue", "jay, bird, grey", "jay, letter")


def test_odd_lines_of_class_names_follow_the_written_rules(tmp_path: Path) -> None:
    text = b"\n \t \nred fox\tVulpes vulpes\nb\nc\t\nd\t , caf\xe9 \x1b[31m,x\ne <i>&amp;</i>\n" * 2
    found = names(tmp_path, "red fox", "b", "c", "d", "e", text=text)
    assert found == ("Vulpes vulpes", "b", "c", "caf\\xe9 \\x1b[31m", "<i>&amp;</i>")
    for found_ in found:
        found_.encode()  # what checkpoints, bundles and the index can hold


def test_class_names_that_cannot_be_right_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^\S*words.txt line 2 names a a second time, and differently: keep"):
        names(tmp_path, "a", text="a\tcat\na\tdog\n")
    assert names(tmp_path, "b", text="a\tcat\na\tdog\nb\teel\n") == ("eel",)  # of no class here
    with pytest.raises(UserError, match=r"words.txt line 1: a name of 1001 characters; at most 1000$"):
        names(tmp_path, "a", text="a\t" + "x" * 1001)
    monkeypatch.setattr(label_files, "MAX_CLASS_NAMES_BYTES", 2**20)
    with pytest.raises(UserError, match=r"words.txt is larger than 1 MiB: it should hold a line 'class<TAB>"):
        names(tmp_path, "a", text="a\tcat\n" * 2**18)
