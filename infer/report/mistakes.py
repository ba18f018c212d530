"""The section with the mistakes made with most confidence, and the parts of the pictures that spoke for them.

Shapes: N images, H and W rows and columns, C classes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from infer.report.page import GREEN, ORANGE, Section, bar_row, figure, picture, text
from infer.report.pictures import TITLES, Pictures

NUM_MISTAKES = 12
HEAT = (0xD5, 0x5E, 0x00)


def make_mistakes(pictures: Pictures) -> Section:
    """Show the wrong predictions with the highest probability, and what in the picture spoke for them."""
    key, look, found_N = "mistakes", pictures.look, pictures.found
    title = TITLES[key]
    wrong = np.flatnonzero(~pictures.right)
    if not len(wrong):
        return Section(key, title, f"<p>There is none. {text(pictures.words())}</p>")
    sure = np.round(look.probabilities[wrong, found_N[wrong]].astype(np.float64), 4)
    chosen = [int(number) for number in wrong[np.argsort(-sure, kind="stable")][:NUM_MISTAKES]]
    pixels = pictures.looker.pixels(look, chosen)
    maps = {
        number: pictures.looker.activation_map(pixels_HWC, int(found_N[number]))
        for number, pixels_HWC in pixels.items()
    }
    cards = "".join(
        _mistake(pictures, number, pixels[number], maps[number]) for number in chosen if number in pixels
    )
    side = next((" × ".join(map(str, cam_HW.shape)) for cam_HW in maps.values()), "a few")
    caption = (
        f"The {len(chosen)} mistakes of which the model was most sure. Left: what it saw. Right: the more "
        "orange, the more this part speaks for the wrong class, by Grad-CAM (Selvaraju et al. 2017) on the "
        f"map of the last convolution, of {side} cells. (The plain class-activation map is not defined for "
        "AlexNet's three fully connected layers.) A grey picture: no part of it alone speaks for the "
        f"class. {pictures.words()}"
    )
    return Section(key, title, figure(f"<div>{cards}</div>", caption, kind="cards"))


def _mistake(
    pictures: Pictures, number: int, pixels_HWC: NDArray[np.uint8], cam_HW: NDArray[np.float32]
) -> str:
    probabilities_C, label = pictures.look.probabilities[number], int(pictures.look.labels[number])
    found = int(pictures.found[number])
    truth, taken = pictures.labels[label], pictures.labels[found]
    shown = picture(pixels_HWC, f"validation image of class {truth}")
    heat = picture(overlay(pixels_HWC, cam_HW), f"the same with the parts marked that speak for {taken}")
    bars = bar_row(taken, float(probabilities_C[found]), f"{probabilities_C[found]:.1%}", color=ORANGE)
    bars += bar_row(
        truth, float(probabilities_C[label]), f"{probabilities_C[label]:.1%}", color=GREEN, marked=True
    )
    return (
        f'<div class="card"><div class="pair">{shown}{heat}</div>{bars}'
        f"<p>{text(pictures.name(number))}</p></div>"
    )


def overlay(pixels_HWC: NDArray[np.uint8], cam_HW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A grey picture with its activation map over it in orange.

    Args:
        pixels_HWC: the picture.
        cam_HW: of another size, 0..1; it is enlarged bilinearly.
    Returns:
        (H, W, 3) uint8.
    """
    height, width, _ = pixels_HWC.shape
    enlarged = Image.fromarray(cam_HW).resize((width, height), Image.Resampling.BILINEAR)
    share_HW1 = 0.7 * np.clip(np.asarray(enlarged, dtype=np.float32), 0, 1)[..., None]
    grey_HW1 = np.asarray(Image.fromarray(pixels_HWC).convert("L"), dtype=np.float32)[..., None]
    mixed = (1 - share_HW1) * grey_HW1 + share_HW1 * np.array(HEAT, dtype=np.float32)
    return np.rint(mixed).astype(np.uint8)
