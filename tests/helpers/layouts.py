"""Data folders in the layouts of Tiny ImageNet and ImageNet, as they are distributed."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.images import encode, photo

JPEG = encode(photo(16, 16), "JPEG")

SYNSET_IDS = ("n01443537", "n01629819", "n02012849", "n03126707")

WORDS = "n01443537\tgoldfish, Carassius auratus\nn01629819\tEuropean fire salamander\n"

CRANES = "n02012849\tcrane\nn03126707\tcrane\n"


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(JPEG)


def make_tiny(root: Path) -> Path:
    """Tiny ImageNet as it is distributed, with four classes."""
    for synset_id in SYNSET_IDS:
        for number in range(3):
            touch(root / "train" / synset_id / "images" / f"{synset_id}_{number}.JPEG")
        (root / "train" / synset_id / f"{synset_id}_boxes.txt").write_text("boxes")
    rows = []
    for number in range(8):
        touch(root / "val" / "images" / f"val_{number}.JPEG")
        rows.append(f"val_{number}.JPEG\t{SYNSET_IDS[-1 - number % 4]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    touch(root / "test" / "images" / "test_0.JPEG")
    (root / "wnids.txt").write_text("\n".join(reversed(SYNSET_IDS)))
    (root / "words.txt").write_text("n00001740\tentity\n" + WORDS + CRANES)
    return root


def make_imagenet(root: Path) -> Path:
    """ImageNet as it is distributed: training folders, flat validation images, no labels yet."""
    for synset_id in SYNSET_IDS:
        touch(root / "train" / synset_id / f"{synset_id}_1.JPEG")
    for number in range(1, 9):
        touch(root / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    return root
