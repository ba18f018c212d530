"""A picture of a dataset: some images of every class under its name, as one HTML or PNG file."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.common.errors import ImageError, SaveError, UserError
from data_pipeline.common.files import write_atomic
from data_pipeline.common.text import printable, visible
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.decode.pillow import decode_one, read_header
from data_pipeline.inspect.stats import ClassInfo, Info
from data_pipeline.transforms.crop import eval_crop_params
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.sampler import permutation_at

SIDE_PX = 96
MAX_CLASSES = {".html": 1000, ".png": 120}
"""More classes than these are left out, evenly, and the picture says so."""

_QUALITY = 82
_THUMBNAIL = Preprocessing(resize_px=SIDE_PX, crop_px=SIDE_PX)


@dataclass(frozen=True)
class Cell:
    """One image: (side, side, 3) pixels, or the reason why there are none."""

    name: str
    pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] | None
    reason: str = ""


def check_grid_path(path: Path) -> None:
    """Refuse a file that will not be written, before hours are spent on what would be in it.

    Raises:
        UserError: another suffix, or no such folder.
    """
    if path.suffix.lower() not in MAX_CLASSES:
        raise UserError(f"--grid {printable(path)}: the name must end in {' or '.join(MAX_CLASSES)}")
    if not path.parent.is_dir():
        raise UserError(f"--grid {printable(path)}: there is no folder {printable(path.parent)}")


def write_grid(info: Info, dataset: Dataset, path: Path) -> None:
    """Write a picture of a split: for each class its number, name and count, and a few images.

    The images are the first of each class in a fixed random order, cut to squares. One that cannot be read
    leaves an empty square with the reason.

    Args:
        info: of the data folder.
        dataset: the split that is shown.
        path: a file that ends in .html, which needs no other file, or in .png.
    Raises:
        UserError: as `check_grid_path`.
        SaveError: the file cannot be written.
    """
    check_grid_path(path)
    suffix = path.suffix.lower()
    shown = _evenly(info.classes, MAX_CLASSES[suffix])
    per_class = 8 if len(shown) <= 40 else 5 if len(shown) <= 250 else 3
    rows = ((found, _cells(dataset, places)) for found, places in _places(dataset, shown, per_class))
    content = (_html if suffix == ".html" else _png)(info, dataset.split, rows, len(shown), per_class)
    try:
        write_atomic(path, content)
    except OSError as error:
        raise SaveError(f"{printable(path)} could not be written: {error.strerror or error}") from error


Rows = Iterator[tuple[ClassInfo, list[Cell]]]


def _evenly(classes: tuple[ClassInfo, ...], limit: int) -> tuple[ClassInfo, ...]:
    if len(classes) <= limit:
        return classes
    return tuple(classes[i] for i in np.linspace(0, len(classes) - 1, limit).astype(int).tolist())


def _places(
    dataset: Dataset, shown: tuple[ClassInfo, ...], per_class: int
) -> Iterator[tuple[ClassInfo, list[int]]]:
    order = permutation_at(0, 0, len(dataset))
    by_class = order[np.argsort(dataset.labels[order], kind="stable")]
    ends = np.cumsum(np.bincount(dataset.labels, minlength=len(dataset.classes))).tolist()
    for found in shown:
        first = ends[found.id - 1] if found.id else 0
        yield found, by_class[first : min(first + per_class, ends[found.id])].tolist()


def _cells(dataset: Dataset, places: list[int]) -> list[Cell]:
    cells = []
    for place in places:
        name = printable(dataset.name_at(place))
        try:
            data = dataset.read(place)
            size = read_header(data, _THUMBNAIL.max_pixels)
            cells.append(Cell(name, decode_one(data, eval_crop_params([size], _THUMBNAIL), 0)))
        except ImageError as error:
            cells.append(Cell(name, None, str(error)))
    return cells


def _title(info: Info, split: str, num_shown: int) -> str:
    found = info.splits[split]
    some = f", {num_shown} of them shown" if num_shown < len(info.classes) else ""
    name = Path(info.root).resolve().name
    return visible(f"{name} / {split}: {found.num_samples:,} images of {len(info.classes):,} classes{some}")


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #888 }
body { font: 14px/1.4 system-ui, sans-serif; margin: 24px; }
h1 { font-size: 18px; font-weight: 600; margin: 0 0 4px }
p { margin: 0 0 20px; color: var(--soft) }
main { display: grid; gap: 20px 28px;
       grid-template-columns: repeat(auto-fill, minmax(min(100%, ${block}px), 1fr)) }
section { border-top: 1px solid var(--line); padding-top: 6px; content-visibility: auto }
h2 { display: flex; gap: 8px; font-size: 14px; font-weight: 600; margin: 0 0 6px }
h2 i { font-style: normal; font-weight: 400; color: var(--soft); margin-left: auto; white-space: nowrap }
h2 b { font-weight: 400; color: var(--soft) }
div { display: grid; grid-template-columns: repeat($columns, minmax(0, ${side}px)); gap: 4px }
img, em { width: 100%; aspect-ratio: 1; border-radius: 3px; display: block; box-sizing: border-box;
          outline: 1px solid var(--line); outline-offset: -1px }
em { padding: 6px; outline: 1px dashed #c33; color: #c33; font: 10px/1.3 system-ui, sans-serif;
     overflow: hidden; overflow-wrap: anywhere }
</style></head><body><h1>$title</h1><p>$note</p><main>
""")


def _html(info: Info, split: str, rows: Rows, num_shown: int, per_class: int) -> bytes:
    parts = [
        _PAGE.substitute(
            title=html.escape(_title(info, split, num_shown)),
            note=f"Up to {per_class} images of a class, from a fixed random order, cut to squares.",
            side=SIDE_PX,
            columns=per_class,
            block=(SIDE_PX + 4) * per_class * 3 // 4,
        )
    ]
    for found, cells in rows:
        label, name = html.escape(visible(found.label)), html.escape(visible(found.name))
        also = "" if label == name else f" <b>{name}</b>"
        parts.append(
            f"<section><h2><b>{found.id}</b> <span>{label}</span>{also}"
            f"<i>{found.counts[split]:,} images</i></h2><div>"
        )
        parts += [_html_cell(cell) for cell in cells]
        parts.append("</div></section>\n")
    parts.append("</main></body></html>\n")
    return "".join(parts).encode("utf-8", "backslashreplace")


def _html_cell(cell: Cell) -> str:
    name = html.escape(visible(cell.name))
    if cell.pixels is None:
        reason = html.escape(visible(cell.reason))
        return f'<em title="{name}: {reason}">{reason}</em>'
    buffer = io.BytesIO()
    Image.fromarray(cell.pixels).save(buffer, "JPEG", quality=_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{name}" title="{name}" src="data:image/jpeg;base64,{data}">'


_GAP, _MARGIN, _HEAD, _CAPTION = 4, 24, 44, 26
_INK, _SOFT, _LINE, _BAD = (32, 32, 32), (120, 120, 120), (215, 215, 215), (190, 40, 40)


def _png(info: Info, split: str, rows: Rows, num_shown: int, per_class: int) -> bytes:
    """Classes in columns that make the sheet about as wide as it is high."""
    block_w, block_h = per_class * (SIDE_PX + _GAP) - _GAP, _CAPTION + SIDE_PX
    columns = math.ceil((num_shown * (block_h + 14) / (block_w + 28)) ** 0.5)
    lines = -(-num_shown // columns)
    width = 2 * _MARGIN + columns * (block_w + 28) - 28
    height = 2 * _MARGIN + _HEAD + lines * (block_h + 14) - 14
    sheet = Image.new("RGB", (width, height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    title, font, small = (ImageFont.load_default(size) for size in (22, 15, 11))
    draw.text((_MARGIN, _MARGIN - 4), _fit(draw, _title(info, split, num_shown), title, width - 2 * _MARGIN),
              _INK, title)  # fmt: skip
    for number, (found, cells) in enumerate(rows):
        # down the columns, as one reads a list
        left = _MARGIN + number // lines * (block_w + 28)
        top = _MARGIN + _HEAD + number % lines * (block_h + 14)
        count = f"{found.counts[split]:,} images"
        right = left + block_w - draw.textlength(count, font)
        draw.text((right, top), count, _SOFT, font)
        also = "" if found.label == found.name else found.name
        x, y = left, top
        for words, ink in ((str(found.id), _SOFT), (found.label, _INK), (also, _SOFT)):
            words = _fit(draw, visible(words), font, right - x - 10)
            draw.text((x, y), words, ink, font)
            x += int(draw.textlength(words, font)) + 8
        for place, cell in enumerate(cells):
            corner = (left + place * (SIDE_PX + _GAP), top + _CAPTION)
            x, y = corner
            if cell.pixels is not None:
                sheet.paste(Image.fromarray(cell.pixels), corner)
            draw.rectangle(
                (x, y, x + SIDE_PX - 1, y + SIDE_PX - 1), outline=_BAD if cell.pixels is None else _LINE
            )
            for line, text in enumerate(_wrap(draw, visible(cell.reason), small, SIDE_PX - 12)[:6]):
                draw.text((x + 6, y + 6 + 14 * line), text, _BAD, small)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _fit(draw: ImageDraw.ImageDraw, text: str, font: Font, width: float) -> str:
    """The text, or as much of its start as there is room for."""
    text = text[:400]
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(f"{text}…", font) > width:
        text = text[:-1]
    return f"{text}…" if text else ""


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: Font, width: float) -> list[str]:
    lines = [""]
    for word in text[:200].split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width:
            lines[-1] = longer
        else:
            lines.append(_fit(draw, word, font, width))
    return [line for line in lines if line]
