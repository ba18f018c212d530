"""Every kind of file that a data folder may hold, on each backend: golden pixels, or a reason.

The table in docs/data.md names each case.
`python -m tests.data_pipeline.loading.test_bad_files` prints the golden pixels anew.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from data_pipeline.common.errors import ImageError
from data_pipeline.common.files import read_file
from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.image_folder import load_image_folder
from data_pipeline.decode.backend import ImageBackend
from data_pipeline.decode.dali import DaliBackend
from data_pipeline.decode.header import read_header
from data_pipeline.decode.pillow import PillowBackend
from data_pipeline.loader import Loader
from data_pipeline.loading.bad_files import FaultLog
from data_pipeline.loading.scan import with_table
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.crop import eval_crop_params
from data_pipeline.transforms.preprocessing import Preprocessing
from tests.helpers.images import KINDS, as_numpy, broken, encode, kinds, photo, suffix_for, write_folder
from tests.helpers.ranks import REPOSITORY

PREPROCESSING = Preprocessing(resize_px=72, crop_px=64)
GOLDEN = Path(__file__).parents[2] / "golden" / "pixels.json"

# Of another libjpeg's rounding, and on a GPU of another inverse transform; means over 16 x 16 pixels.
TOLERANCE = {"dali": 2, "dali graph": 2, "pillow": 2, "dali gpu": 6}

GOOD = (*KINDS, "png 1 x 1", "png 5000 x 2", "jpeg 2 x 5000")
REASONS = {
    "jpeg, half": "truncated JPEG",
    "jpeg, 20 bytes short": "truncated JPEG",
    "jpeg, header only": "truncated JPEG",
    "jpeg, bit rot": "damaged JPEG",
    "jpeg progressive, half": "truncated JPEG",
    "png, 2000 bytes short": "truncated PNG",
    "png, bit rot": "damaged PNG",
    "tiff, 500 bytes short": "truncated TIFF",
    "webp, 500 bytes short": "damaged WebP",
    "pnm, 500 bytes short": "truncated PNM",
    "pnm without end of header": "damaged PNM: no size and depth in its first 4096 bytes",
    "avif, half": "damaged AVIF",
    "jp2, half": "damaged JPEG 2000",
    "jp2, container of another size": "damaged JPEG 2000: its container says 7 x 7 pixels",
    "ico, half": "truncated ICO",
    "ico without a picture": "damaged ICO: an icon without a picture",
    "tga, half": "truncated TGA",
    "tga of text": "damaged TGA",
    "text": "not an image of a known format",
    "empty": "empty file",
    "png of 30000 x 30000": "30000 x 30000 pixels are above the limit",
    "pnm of 30000 x 30000": "30000 x 30000 pixels are above the limit",
    "jp2 of 30000 x 30000": "30000 x 30000 pixels are above the limit",
    "ico of 30000 x 30000": "30000 x 30000 pixels are above the limit",
    "tga of 30000 x 30000": "30000 x 30000 pixels are above the limit",
    "missing": "cannot be read: No such file or directory",
    "symbolic link to itself": "cannot be read: Too many levels of symbolic links",
    "folder": "not a regular file",
    "pipe": "not a regular file",
}
"""The reason given for each file that is no image. The last four are kinds of place, not content."""

BACKENDS = ["dali", "dali graph", "pillow", pytest.param("dali gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=BACKENDS)
def named_backend(request: pytest.FixtureRequest) -> Iterator[tuple[str, ImageBackend]]:
    name: str = request.param
    made: ImageBackend = (
        PillowBackend(2, 64)
        if name == "pillow"
        else DaliBackend("gpu" if name == "dali gpu" else "cpu", 0, 64, 64, 2, whole_graph=name != "dali")
    )
    yield name, made
    made.close()


def good_files() -> dict[str, bytes]:
    files = kinds() | {
        "png 1 x 1": encode(photo(1, 1), "PNG"),
        "png 5000 x 2": encode(photo(2, 5000), "PNG"),
        "jpeg 2 x 5000": encode(photo(5000, 2), "JPEG"),
    }
    assert tuple(files) == GOOD
    return files


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file for each case, named .jpg whatever it holds, but for TGA; every third name is not UTF-8."""
    root = tmp_path_factory.mktemp("faults")
    paths = {}
    contents = good_files() | broken()
    for number, case in enumerate([*GOOD, *REASONS]):
        suffix = suffix_for(contents.get(case, b""))
        name = b"%03d%s" % (number, b"" if number % 3 else b"\xe9\xff")
        paths[case] = root / f"{os.fsdecode(name)}{suffix}"
        if case in contents:
            paths[case].write_bytes(contents[case])
    paths["symbolic link to itself"].symlink_to(paths["symbolic link to itself"])
    paths["folder"].mkdir()
    os.mkfifo(paths["pipe"])
    return paths


def as_dataset(cases: dict[str, Path]) -> Dataset:
    """The cases as the samples of a split, in their order."""
    first = next(iter(cases.values()))
    names = PackedStrings.pack(path.name for path in cases.values())
    labels = np.arange(len(names), dtype=np.int64) % 2
    return Dataset(first.parents[1], first.parent.name, names, labels, ("a", "b"))


def blocks(image: npt.NDArray[np.int64]) -> list[list[int]]:
    """(64, 64, 3) as the means of 4 x 4 blocks, row by row: (16, 3), rounded."""
    means = image.reshape(4, 16, 4, 16, 3).mean(axis=(1, 3)).reshape(16, 3)
    rounded: list[list[int]] = np.rint(means).astype(int).tolist()
    return rounded


@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_backends_treat_every_kind_of_file_alike(
    cases: dict[str, Path], named_backend: tuple[str, ImageBackend], known: bool
) -> None:
    """Files of which nothing is known, as in prediction, and those of a sample table, as in training."""
    name, backend = named_backend
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert set(golden) == set(GOOD) and set(REASONS) == set(broken()) | set(list(REASONS)[-4:])
    faults = FaultLog()
    loader = Loader(backend, PREPROCESSING, faults=faults)
    if known:
        batches = list(loader.eval(with_table(as_dataset(cases), 1), micro_batch=16))
    else:
        batches = list(loader.predict(cases.values(), micro_batch=16))
    valid = dict(zip(cases, np.concatenate([batch.valid for batch in batches]), strict=True))
    images = dict(zip(cases, np.concatenate([as_numpy(batch.images) for batch in batches]), strict=True))
    reasons = iter([failure for batch in batches for failure in batch.failures])
    for case, image in images.items():
        assert valid[case] == (case in GOOD), f"{case} on {name}"
        if case in GOOD:
            difference = np.abs(np.array(blocks(image)) - golden[case]).max()
            assert difference <= TOLERANCE[name], f"{case} on {name}: {difference}"
        else:
            failure = next(reasons)
            assert REASONS[case] in failure.reason, f"{case} on {name}: {failure.reason}"
            assert failure.path.isascii() and not image.any()
    assert len(faults) == len(REASONS)


def test_golden_pixels_are_those_of_the_picture() -> None:
    """Golden pixels are no proof of themselves: all kinds hold one picture, whose blocks NumPy knows."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    picture = photo(150, 200)
    stored = {"gray": picture.convert("L"), "palette": picture.quantize(64), "rgb": picture}

    def known(kind: str) -> npt.NDArray[np.int64]:
        form = "gray" if "1 bit" in kind else next((form for form in stored if form in kind), "rgb")
        whole = stored[form].convert("RGB").resize((96, 72), Image.Resampling.BILINEAR)
        return np.array(blocks(np.asarray(whole).astype(np.int64)[4:68, 16:80]))

    unturned = [kind for kind in kinds() if "turned" not in kind or kind.endswith("turned 1")]
    for kind in unturned:
        limit = 20 if "1 bit" in kind or kind == "gif" else 4  # dithered; 256 colours
        assert np.abs(np.array(golden[kind]) - known(kind)).max() <= limit, kind
    assert len(unturned) == 33


def test_file_that_vanishes_during_an_epoch_is_left_out(
    tmp_path: Path, named_backend: tuple[str, ImageBackend], caplog: pytest.LogCaptureFixture
) -> None:
    _, backend = named_backend
    write_folder(tmp_path / "train", {"a": 20, "b": 20})
    dataset = load_image_folder(tmp_path, "train")
    options: dict[str, Any] = {"seed": 1, "global_batch": 4, "num_steps": 20}
    order = [
        tuple(batch.paths) for batch in Loader(backend, PREPROCESSING).train(dataset, Augment(), **options)
    ]
    victim = order[9][2]  # read long after the first batch: two are decoded ahead, and as many read
    batches = Loader(backend, PREPROCESSING, prefetch=1).train(dataset, Augment(), **options)
    with caplog.at_level(logging.WARNING, "data_pipeline"):
        seen = [next(batches)]
        victim.unlink()
        seen += list(batches)
    assert [tuple(batch.paths) for batch in seen] == order  # nobody takes its place
    lost = [(batch.step, int(i)) for batch in seen for i in np.flatnonzero(~batch.valid)]
    assert lost[0] == (9, 2) and len(lost) == 2  # once in each of two epochs
    assert caplog.messages == [f"left out {victim}: cannot be read: No such file or directory"]


def test_file_without_permission_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(kinds()["jpeg gray"])
    (tmp_path / "secret.jpg").chmod(0)
    reasons: list[str] = []

    def read() -> None:
        if os.geteuid() == 0:  # root may read everything: this thread gives that up, and no other
            ctypes.CDLL(None).setfsuid(65534)
        try:
            read_file(tmp_path / "secret.jpg", 10**6)
        except ImageError as error:
            reasons.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    assert reasons == ["cannot be read: Permission denied"]


def test_docs_have_a_row_for_every_kind_of_file() -> None:
    text = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
    table = text[text.index("| case |") :].splitlines()
    first = [row.split("|")[1].strip() for row in table[2:] if row.startswith("|")]
    named = {case for row in first for case in row.split("; ")}
    assert named >= {*GOOD, *REASONS}, sorted({*GOOD, *REASONS} - named)


def _golden() -> str:
    backend = PillowBackend(1, 1)
    rows = []
    for case, content in good_files().items():
        crops = eval_crop_params([read_header(content, PREPROCESSING.max_pixels)], PREPROCESSING)
        image = as_numpy(backend.decode([content], crops).images)[0]
        rows.append(f"{json.dumps(case)}: {json.dumps(blocks(image))}")
    backend.close()
    return "{\n" + ",\n".join(rows) + "\n}"


if __name__ == "__main__":
    sys.stdout.write(_golden() + "\n")
