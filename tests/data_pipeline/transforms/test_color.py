"""Colours: those of the reference on every decoder, with the paper's covariance."""

from __future__ import annotations

import numpy as np

from data_pipeline.decode.dali import DaliBackend
from data_pipeline.decode.pillow import PillowBackend
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.color import colors_at
from data_pipeline.transforms.crop import train_crop_params
from data_pipeline.transforms.preprocessing import Preprocessing
from tests.helpers.images import as_numpy, encode, photo
from tests.helpers.reference import apply_colors

PREPROCESSING = Preprocessing(crop_px=64, resize_px=72)

COLORFUL = Augment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, pca=0.1)

FILES = [encode(photo(90, 120, seed=i), "PNG") for i in range(6)]

SIZES = [(90, 120)] * len(FILES)


def test_colour_augmentation_matches_the_reference(backend: PillowBackend | DaliBackend) -> None:
    """Within one level: a resized pixel is rounded before the colours, and may fall either way."""
    plain = train_crop_params(SIZES, 2, range(6), 7, PREPROCESSING, Augment())
    vivid = train_crop_params(SIZES, 2, range(6), 7, PREPROCESSING, COLORFUL)
    assert vivid.colors is not None
    before, after = (as_numpy(backend.decode(FILES, g).images).astype(np.uint8) for g in (plain, vivid))
    expected = apply_colors(before, vivid.colors)
    assert np.abs(after.astype(int) - expected).max() <= 1
    assert np.abs(after.astype(int) - before).mean() > 5


def test_pca_noise_has_the_papers_covariance() -> None:
    colors = colors_at(1, 0, np.arange(40_000), Augment(pca=0.1))
    assert colors is not None and np.abs(colors[:, :, :3] - np.eye(3)).max() < 1e-6
    augment = Augment()
    vectors = np.array(augment.pca_eigenvectors)
    expected = vectors.T @ np.diag((25.5 * np.array(augment.pca_eigenvalues)) ** 2) @ vectors
    assert np.abs(np.cov(colors[:, :, 3].T) - expected).max() < 0.03 * expected.max()


def test_colours_of_a_sample_follow_from_its_position() -> None:
    every = colors_at(3, 5, np.arange(50), COLORFUL)
    alone = colors_at(3, 5, [17], COLORFUL)
    assert every is not None and alone is not None and np.array_equal(every[17], alone[0])
    assert colors_at(3, 5, np.arange(50), Augment()) is None
