"""The compiled resize against Pillow's, to the bit; and what happens where it is not to be had."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.decode import resize, resize_kernel, resize_lanes
from data_pipeline.decode.pillow import blank_images, finish_crop
from data_pipeline.decode.resize import Resizer
from data_pipeline.transforms.crop import CropParams
from data_pipeline.transforms.preprocessing import Preprocessing
from tests.helpers.crops import KINDS, crops_by_pillow, crops_of


@pytest.fixture
def afresh() -> Iterator[None]:
    """A process that has not looked for the compiled resize yet."""
    resize._compiled.cache_clear()
    yield
    resize._compiled.cache_clear()


def one_recipe(
    window: npt.NDArray[np.uint8],
    size: tuple[int, int],
    offset: tuple[int, int],
    crop_px: int,
    flip: bool = False,
    colors: npt.NDArray[np.float32] | None = None,
) -> CropParams:
    return CropParams(
        windows=np.array([(0, 0, *window.shape[:2])]),
        sizes=np.array([size]),
        offsets=np.array([offset]),
        flips=np.array([flip]),
        crop_px=crop_px,
        colors=colors,
    )


def assert_same(resizer: Resizer, window: npt.NDArray[np.uint8], crops: CropParams) -> None:
    images = blank_images(crops)
    resizer.finish_into(images, window, crops, 0)
    expected = finish_crop(Image.fromarray(window), crops, 0)
    assert np.array_equal(images[0], expected), f"{window.shape}, {crops}"


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_compiled_resize_gives_pillows_pixels(data: st.DataObject) -> None:
    resizer = Resizer()
    assert resizer._compiled is not None
    height, width = data.draw(st.integers(1, 500)), data.draw(st.integers(1, 500))
    crop_px = data.draw(st.integers(1, 120))
    size = (data.draw(st.integers(crop_px, 300)), data.draw(st.integers(crop_px, 300)))
    outside = crop_px - 1 if data.draw(st.booleans(), "padded") else 0
    offset = (
        data.draw(st.integers(-outside, size[0] - crop_px + outside)),
        data.draw(st.integers(-outside, size[1] - crop_px + outside)),
    )
    random = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    window = random.integers(0, 256, (height, width, 3), np.uint8)
    if data.draw(st.booleans(), "black and white only"):
        window = np.where(window > 127, np.uint8(255), np.uint8(0))
    colors = None
    if data.draw(st.booleans(), "colours"):
        colors = (np.eye(3, 4) + random.normal(0, 0.3, (1, 3, 4)) * (1, 1, 1, 100)).astype(np.float32)
    flip = data.draw(st.booleans(), "mirrored")
    assert_same(resizer, window, one_recipe(window, size, offset, crop_px, flip, colors))


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 700), (700, 1), (3000, 40), (40, 3000), (224, 224), (224, 500)]
)
def test_compiled_resize_takes_strips_and_unscaled_windows(shape: tuple[int, int]) -> None:
    window = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    assert_same(Resizer(), window, one_recipe(window, (224, 224), (0, 0), 224, flip=True))


@pytest.mark.parametrize("shape", [(1, 10_000), (10_000, 1)])
def test_thousandfold_reduction_is_left_to_pillow(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    resizer = Resizer()
    monkeypatch.setattr(resizer, "_compiled", lambda *_: pytest.fail("compiled"))
    window = np.random.default_rng(5).integers(0, 256, (*shape, 3), np.uint8)
    assert_same(resizer, window, one_recipe(window, (2, 2), (0, 0), 2))


def test_compiled_resize_takes_a_read_only_window() -> None:
    window = np.random.default_rng(2).integers(0, 256, (90, 70, 3), np.uint8)
    window.flags.writeable = False
    assert_same(Resizer(), window, one_recipe(window, (64, 64), (0, 0), 64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "resize_px", "crop_px"),
    [((64, 64), 64, 56), ((64, 64), 72, 64), ((32, 32), 40, 33), ((375, 500), 72, 64), ((97, 31), 16, 9),
     ((31, 97), 12, 9), ((1, 1), 10, 8), ((3, 2), 9, 9), ((300, 200), 12, 12)],
)  # fmt: skip
def test_batch_crops_are_pillows(kind: str, size: tuple[int, int], resize_px: int, crop_px: int) -> None:
    count = 24
    pixels = np.random.default_rng(6).integers(0, 256, (5, *size, 3), np.uint8)
    pixels.flags.writeable = False
    indices = np.arange(count) * 3 % 5
    crops = crops_of(kind, size, count, Preprocessing(resize_px=resize_px, crop_px=crop_px))
    resizer = Resizer()
    assert resizer._compiled is not None
    images = blank_images(crops)
    resizer.crop_batch(images, pixels, indices, crops)
    assert np.array_equal(images, crops_by_pillow(pixels, indices, crops))


def test_batch_crops_refuse_places_outside_the_pixels() -> None:
    pixels = np.zeros((2, 20, 20, 3), np.uint8)
    crops = crops_of("random", (20, 20), 3, Preprocessing(resize_px=20, crop_px=16))
    outside = replace(crops, windows=crops.windows + np.array([0, 1, 0, 0]))
    for indices, refused in (((0, 1, 2), crops), ((0, -1, 1), crops), ((0, 1, 1), outside)):
        with pytest.raises(AssertionError):
            Resizer().crop_batch(blank_images(crops), pixels, np.array(indices), refused)


@pytest.mark.parametrize("reason", ["no compiler", "shrinks 5000 times"])
def test_batch_crops_fall_back_to_pillow(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resizer = Resizer()
    monkeypatch.setattr(
        resizer, "_compiled", None if reason == "no compiler" else lambda *_: pytest.fail("compiled")
    )
    pixels = np.random.default_rng(8).integers(0, 256, (1, 20, 10_000, 3), np.uint8)
    crops = CropParams(
        windows=np.array([(3, 0, 9, 10_000), (0, 5, 20, 30)]),
        sizes=np.array([(2, 2), (3, 2)]),
        offsets=np.array([(0, 0), (1, 0)]),
        flips=np.array([True, False]),
        crop_px=2,
    )
    images = blank_images(crops)
    indices = np.zeros(2, np.int64)
    resizer.crop_batch(images, pixels, indices, crops)
    assert np.array_equal(images, crops_by_pillow(pixels, indices, crops))


def test_resize_falls_back_where_pillows_pixels_differ(
    afresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = resize_kernel.compile_crop_batch()

    def other_order(*arguments: Any) -> None:
        real(*arguments)
        images_NVHWC = arguments[7]
        images_NVHWC[1, 0, 5, 5, 0] ^= 1

    monkeypatch.setattr(resize_kernel, "compile_crop_batch", lambda: other_order)
    window = np.random.default_rng(3).integers(0, 256, (90, 70, 3), np.uint8)
    assert_same(Resizer(), window, one_recipe(window, (64, 64), (0, 0), 64))
    assert f"the compiled resize differs from Pillow {PIL.__version__}" in caplog.text


def test_resize_falls_back_to_pillow_without_a_compiler(
    afresh: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    window = np.random.default_rng(4).integers(0, 256, (90, 70, 3), np.uint8)
    resizer = Resizer()
    assert_same(resizer, window, one_recipe(window, (64, 64), (0, 0), 64))
    assert resizer._compiled is None
    assert caplog.messages == [
        "Numba cannot compile the resize (NUMBA_DISABLE_JIT is set): Pillow resizes, more slowly"
    ]


@pytest.mark.slow
def test_resize_recompiles_where_its_lanes_or_its_cache_change(
    afresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the kernel as it is, with empty parts: to compile those takes several times as long as all else."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    for part in ("_resize", "_cut_views", "_color"):
        monkeypatch.setattr(resize_kernel, part, numba.njit(lambda *_: None))
    monkeypatch.setattr(resize, "_agrees_with_pillow", lambda _: True)  # the whole kernel does, see above
    caplog.set_level("INFO")
    resize_kernel.compile_crop_batch()
    assert [line.split(" in ")[0] for line in caplog.messages] == ["compiled the resize for this processor"]
    caplog.clear()
    resize_kernel.compile_crop_batch()
    assert not caplog.messages
    changed = tmp_path / "resize_lanes.py"  # Numba looks at the function that it keeps, not at those it calls
    changed.write_text(Path(resize_lanes.__file__).read_text() + "# changed")
    monkeypatch.setattr(resize_lanes, "__file__", str(changed))
    for _ in range(2):
        resize_kernel.compile_crop_batch()
    assert [line.split(" in ")[0] for line in caplog.messages] == ["compiled the resize for this processor"]
    caplog.clear()
    (index,) = tmp_path.rglob("*.nbi")
    index.write_bytes(index.read_bytes()[:100])
    assert Resizer()._compiled is not None
    refused, compiled = caplog.messages
    assert refused.startswith("Numba's cache cannot be used (")
    assert compiled.startswith("compiled the resize")
