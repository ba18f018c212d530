"""DALI compared with Pillow, pixel by pixel, and both on broken files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import pytest

from data_pipeline.decode import dali as dali_module
from data_pipeline.decode.backend import ImageBackend
from data_pipeline.decode.dali import DaliBackend
from data_pipeline.decode.feed import cut_as_bmp
from data_pipeline.decode.header import read_header
from data_pipeline.decode.pillow import PillowBackend
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.crop import CropParams, eval_crop_params, ten_crop_params, train_crop_params
from data_pipeline.transforms.preprocessing import Preprocessing
from tests.helpers.crops import AUGMENTS
from tests.helpers.images import BROKEN_KINDS, as_numpy, broken, encode, kinds, photo

PREPROCESSING = Preprocessing(resize_px=72, crop_px=64)


# In levels of 0..255. Decoded pixels are equal on the CPU; resizing rounds differently. In the outermost row
# and column of a reduced image DALI repeats the edge where Pillow weighs only the pixels that there are.
# nvJPEG's own inverse transform differs from libjpeg's by a few levels (bounds not measured yet).
# On the CPU our own resize gives Pillow's pixels to the bit. "graph" is all of the GPU's graph, on the CPU.
MAX_INSIDE = {"cpu": 0, "graph": 1, "gpu": 24}


MAX_AT_EDGE = {"cpu": 0, "graph": 24, "gpu": 32}


MEAN_DIFFERENCE = {"cpu": 0, "graph": 0.5, "gpu": 1.5}


Device = Literal["cpu", "graph", "gpu"]


devices = pytest.mark.parametrize("device", ["cpu", "graph", pytest.param("gpu", marks=pytest.mark.gpu)])


@pytest.fixture
def dali(device: Device) -> Iterator[ImageBackend]:
    where: Literal["cpu", "gpu"] = "gpu" if device == "gpu" else "cpu"
    backend = DaliBackend(where, 0, PREPROCESSING.crop_px, 48, 2, whole_graph=device != "cpu")
    yield backend
    backend.close()


@pytest.fixture
def pillow() -> Iterator[PillowBackend]:
    backend = PillowBackend(num_threads=2, max_batch=48)
    yield backend
    backend.close()


def recipes(files: list[bytes]) -> dict[str, CropParams]:
    sizes = np.array([read_header(file, 10**8) for file in files])
    positions = np.arange(len(files))
    return {
        "evaluation": eval_crop_params(sizes, PREPROCESSING),
        "random-resized": train_crop_params(sizes, 1, positions, 7, PREPROCESSING, Augment()),
        "random": train_crop_params(sizes, 1, positions, 7, PREPROCESSING, Augment(crop="random")),
        "padded": train_crop_params(sizes, 1, positions, 7, PREPROCESSING, Augment(crop="padded")),
    }


def at_edge(crops: CropParams, index: int) -> npt.NDArray[np.bool_]:
    """(crop, crop): which pixels of the crop are in the outermost row or column of the resized image."""
    near = []
    for axis in (0, 1):
        place = crops.offsets[index, axis] + np.arange(crops.crop_px)
        near.append((place == 0) | (place == crops.sizes[index, axis] - 1))
    edge: npt.NDArray[np.bool_] = near[0][:, None] | near[1][None, :]
    return edge[:, ::-1] if crops.flips[index] else edge


@devices
@pytest.mark.parametrize("recipe", ["evaluation", "random-resized", "random", "padded"])
def test_dali_pixels_are_close_to_pillows(
    dali: ImageBackend, pillow: PillowBackend, device: Device, recipe: str
) -> None:
    files = list(kinds().values())
    crops = recipes(files)[recipe]
    ours, reference = dali.decode(files, crops), pillow.decode(files, crops)
    assert not ours.failures and not reference.failures
    difference = np.abs(as_numpy(ours.images) - as_numpy(reference.images))
    for i, (name, one) in enumerate(zip(kinds(), difference, strict=True)):
        edge = at_edge(crops, i)
        assert one[~edge].max() <= MAX_INSIDE[device], f"{name}: {one[~edge].max()}"
        assert one.max() <= MAX_AT_EDGE[device], f"{name}: {one.max()}"
        assert one.mean() <= MEAN_DIFFERENCE[device], f"{name}: {one.mean():.3f}"
    assert as_numpy(reference.images).std(axis=(1, 2, 3)).min() > 20


@devices
def test_dali_leaves_only_the_named_kinds_to_pillow(
    dali: ImageBackend, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_by_pillow: list[bytes] = []

    def noted(file: bytes, crops: CropParams, index: int) -> bytes:
        read_by_pillow.append(file)
        return cut_as_bmp(file, crops, index)

    monkeypatch.setattr(dali_module, "cut_as_bmp", noted)
    files = kinds()
    crops = recipes(list(files.values()))["evaluation"]
    for i, file in enumerate(files.values()):
        dali.decode([file], crops.take([i]))
    by_pillow = [name for name, file in files.items() if file in read_by_pillow]
    rare = ("tiff", "gif", "pnm", "avif", "jp2", "j2k", "ico", "tga")
    assert by_pillow == [name for name in files if name.split()[0] in rare or name == "webp turned"]


@devices
def test_padding_is_black_before_the_colours(
    dali: ImageBackend, pillow: PillowBackend, device: Device
) -> None:
    """Images that are not resized, whose file loses nothing: crops with colours, and ten views."""
    files, sizes = [encode(photo(64, 64, seed=i), "PNG") for i in range(12)], [(64, 64)] * 12
    whole = Preprocessing(resize_px=64, crop_px=64)
    colored = train_crop_params(sizes, 1, range(12), 7, whole, AUGMENTS["padded, colours"])
    for crops, most in ((colored, 1), (ten_crop_params(sizes, whole), 0)):
        ours, reference = (as_numpy(backend.decode(files, crops).images) for backend in (dali, pillow))
        difference = np.abs(ours - reference)
        assert difference.max() <= (0 if device == "cpu" else most)
        assert difference.mean() < 0.01


# Not the JPEG 2000 bomb: OpenJPEG decodes it, and no file comes here before its header was found good. For
# the other bombs DALI takes 2.7 GB before it fails.
NO_IMAGES = [
    pytest.param(kind, marks=pytest.mark.slow) if "30000" in kind else kind
    for kind in BROKEN_KINDS
    if kind not in ("empty", "text", "jp2 of 30000 x 30000")
]


@cache
def neighbour_files() -> list[bytes]:
    return [encode(photo(90, 120, seed=i), "JPEG") for i in range(6)]


@pytest.mark.parametrize("kind", NO_IMAGES)
@devices
def test_broken_file_leaves_its_neighbours_intact(
    dali: ImageBackend, pillow: PillowBackend, device: Device, kind: str
) -> None:
    good = neighbour_files()
    crops = eval_crop_params([(90, 120)] * 7, PREPROCESSING)
    files = [*good[:4], broken()[kind], *good[4:]]
    neighbours = [0, 1, 2, 3, 5, 6]
    for backend in (dali, pillow):
        decoded = backend.decode(files, crops)
        assert list(decoded.failures) == [4], f"{backend.name}: {decoded.failures}"
        images = as_numpy(decoded.images)
        assert not images[4].any()
        alone = as_numpy(backend.decode(good, crops.take(neighbours)).images)
        assert np.array_equal(images[neighbours], alone)


@devices
def test_unreadable_file_leaves_zeros(dali: ImageBackend, pillow: PillowBackend) -> None:
    good = kinds()["jpeg 4:2:0"]
    crops = eval_crop_params([(1, 1), (150, 200)], PREPROCESSING)
    for backend in (dali, pillow):
        decoded = backend.decode([None, good], crops)
        images = as_numpy(decoded.images)
        assert not decoded.failures and not images[0].any() and images[1].any()


@devices
def test_dali_batches_stay_valid_and_may_be_smaller(dali: ImageBackend) -> None:
    first_file, second_file = kinds()["jpeg 4:2:0"], encode(photo(150, 200, seed=5), "JPEG")
    crops = eval_crop_params([(150, 200)] * 3, PREPROCESSING)
    first = dali.decode([first_file] * 3, crops).images
    before = as_numpy(first).copy()
    for _ in range(4):
        second = dali.decode([second_file], crops.take([0])).images
    assert as_numpy(second).shape == (1, 64, 64, 3)
    assert np.array_equal(as_numpy(first), before)
    assert not np.array_equal(as_numpy(second)[0], before[0])


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 700), (700, 2), (63, 65)])
@devices
def test_images_of_odd_sizes_become_crops(
    dali: ImageBackend, pillow: PillowBackend, device: Device, size: tuple[int, int]
) -> None:
    file = encode(photo(*size), "PNG")
    for crops in recipes([file]).values():
        ours, reference = (as_numpy(backend.decode([file], crops).images) for backend in (dali, pillow))
        assert ours.shape == (1, 64, 64, 3)
        assert np.abs(ours - reference).max() <= MAX_AT_EDGE[device]
