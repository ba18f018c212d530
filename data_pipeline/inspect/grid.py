"""Writes the class grid: some images of every class under its name, as one HTML file."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image

from data_pipeline.common.errors import ImageError, SaveError, raising
from data_pipeline.common.files import write_atomic
from data_pipeline.common.text import printable, visible
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.decode.header import read_header
from data_pipeline.decode.pillow import decode_one
from data_pipeline.inspect.stats import Info
from data_pipeline.results.outputs import check_page
from data_pipeline.transforms.crop import eval_crop_params
from data_pipeline.transforms.preprocessing import Preprocessing
from data_pipeline.transforms.sampler import permutation_at

SIDE_PX = 96
MAX_CLASSES = 1000
"""Most classes on a page; of more, evenly spaced ones are shown, and the title has their number."""

_GENERATOR = '<meta name="generator" content="alexnet data info --grid">'
"""By which a page is known that may be replaced."""
_QUALITY = 82
_THUMBNAIL = Preprocessing(resize_px=SIDE_PX, crop_px=SIDE_PX)


def check_grid_path(path: Path) -> None:
    """Refuse a file that will not be written, before hours are spent on its content.

    Raises:
        UserError: another suffix, no such folder or one that cannot be written to, or a file that is no grid.
    """
    check_page(path, "--grid", _GENERATOR, "a page that --grid wrote")


def write_grid(info: Info, dataset: Dataset, path: Path) -> None:
    """Write a page of a split: for each class its number, name and count, and a few images.

    The images are the first of each class in a fixed random order, cut to squares. One that cannot be read
    leaves an empty square with the reason.

    Args:
        info: of the data folder.
        dataset: the split that is shown.
        path: a file that ends in .html; the page needs no other file.
    Raises:
        UserError: as `check_grid_path`.
        SaveError: the file cannot be written.
    """
    check_grid_path(path)
    ids = np.linspace(0, len(info.classes) - 1, min(len(info.classes), MAX_CLASSES)).astype(int)
    per_class = 8 if len(ids) <= 40 else 5 if len(ids) <= 250 else 3
    title = html.escape(_title(info, dataset.split, len(ids)))
    parts = [
        _PAGE.substitute(
            title=title,
            generator=_GENERATOR,
            note=f"Up to {per_class} images of a class, from a fixed random order, cut to squares.",
            side=SIDE_PX,
            columns=per_class,
            block=(SIDE_PX + 4) * per_class * 3 // 4,
        )
    ]
    order = permutation_at(0, 0, len(dataset))
    ends = np.cumsum(np.bincount(dataset.labels, minlength=len(dataset.classes)))
    by_class = np.split(order[np.argsort(dataset.labels[order], kind="stable")], ends[:-1])
    for found in (info.classes[i] for i in ids):
        label, name = html.escape(visible(found.label)), html.escape(visible(found.name))
        also = "" if label == name else f" <b>{name}</b>"
        parts.append(
            f"<section><h2><b>{found.id}</b> <span>{label}</span>{also}"
            f"<i>{found.counts[dataset.split]:,} images</i></h2><div>"
        )
        parts += [_cell(dataset, place) for place in by_class[found.id][:per_class].tolist()]
        parts.append("</div></section>\n")
    parts.append("</main></body></html>\n")
    with raising(SaveError, f"{printable(path)} could not be written"):
        write_atomic(path, "".join(parts).encode("utf-8", "backslashreplace"))


def _title(info: Info, split: str, num_shown: int) -> str:
    found = info.splits[split]
    some = f", {num_shown} of them shown" if num_shown < len(info.classes) else ""
    name = Path(info.root).resolve().name
    return visible(f"{name} / {split}: {found.num_samples:,} images of {len(info.classes):,} classes{some}")


def _cell(dataset: Dataset, place: int) -> str:
    name = html.escape(visible(printable(dataset.name_at(place))))
    try:
        data = dataset.read(place)
        pixels = decode_one(data, eval_crop_params([read_header(data, _THUMBNAIL.max_pixels)], _THUMBNAIL), 0)
    except ImageError as error:
        reason = html.escape(visible(str(error)))
        return f'<em title="{name}: {reason}">{reason}</em>'
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=_QUALITY)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{name}" title="{name}" src="data:image/jpeg;base64,{encoded}">'


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">$generator<title>$title</title>
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
