"""Predictions as one self-contained HTML file that shows what the model saw, with sorting and filters.

The filters and the order are kept in the address behind `#`, so that a view can be linked to:
`gallery.html#errors=1`, `#below=50`, `#find=cat`, `#sort=probability`, `#sort=-probability`. A second press
on a column's name reverses its order.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.text import visible
from infer.bundle.load import Bundle
from infer.predict.rows import OkRow, Prediction, PredictionWithPixels
from infer.predict.table import RowCounter
from infer.predict.writers import name_unwritable

if TYPE_CHECKING:
    from PIL import Image

GENERATOR = '<meta name="generator" content="alexnet predict --html">'
"""By which a gallery is known that may be replaced."""
THUMBNAIL_PX = 96
THUMBNAIL_QUALITY = 80

_STYLE = """
:root{color-scheme:light dark;font:15px/1.4 system-ui,sans-serif;--red:light-dark(#b3261e,#f2827b)}
body{margin:0 auto;max-width:1100px;padding:1rem}
h1{font-size:1.3rem;margin:0}
p{margin:.3rem 0 1rem;opacity:.75}
form{position:sticky;top:0;display:flex;flex-wrap:wrap;gap:.5rem 1rem;align-items:center;padding:.6rem;
background:Canvas;border-bottom:1px solid #8886;z-index:1}
form input[type=search]{min-width:14rem}
form input[type=number]{width:4.5rem}
output{margin-left:auto;font-variant-numeric:tabular-nums}
table{width:100%;border-collapse:collapse;table-layout:fixed}
th{text-align:left;padding:.4rem}
th button{font:inherit;font-weight:600;background:none;border:0;padding:0;cursor:pointer;color:inherit}
th button[data-sorted=up]::after{content:" \\2191"}
th button[data-sorted=down]::after{content:" \\2193"}
th:first-child{width:96px}
th:nth-child(2){width:33%}
td{border-top:1px solid #8884;padding:.4rem;vertical-align:top;overflow-wrap:anywhere}
img,.none{display:block;width:96px;height:96px;border-radius:4px}
img{object-fit:cover}
.none{height:3rem;background:color-mix(in srgb,var(--red) 15%,Canvas);display:grid;place-items:center;
font-size:1.5rem}
.bar{display:grid;grid-template-columns:minmax(4rem,12rem) minmax(3rem,1fr) 4rem;gap:.6rem;
align-items:start}
.bar i{height:.6em;margin-top:.4em;border-radius:3px;background:#3a7bd5}
.bar span:last-child{text-align:right;font-variant-numeric:tabular-nums}
.bar small{opacity:.65}
.bar:not(:first-child){opacity:.65;font-size:.9em}
.error td{color:var(--red)}
tr[hidden]{display:none!important}
@media(max-width:640px){
tr{display:grid;grid-template-columns:110px minmax(0,1fr)}
thead tr{display:flex;flex-wrap:wrap;gap:0 1rem}
thead tr th{width:auto}
td.path,td:last-child{grid-column:2}
td.path+td{border-top:0;padding-top:0}
td:first-child{grid-row:1/3}
}
"""

_SCRIPT = """
const form=document.forms[0],body=document.querySelector("tbody"),rows=[...body.rows];
const buttons=[...document.querySelectorAll("th button")],paragraphs=document.querySelectorAll("p");
const failed=r=>r.classList.contains("error");
const keys={order:r=>+r.dataset.n,path:r=>r.dataset.path,label:r=>r.dataset.label,
probability:r=>+r.dataset.p};
const texts=new Map(rows.map(r=>[r,
  [r.dataset.path,r.dataset.label,r.dataset.class].join(" ").toLowerCase()]));
let sort="order";
function show(){
  const find=form.find.value.toLowerCase(),below=form.below.value===""?Infinity:+form.below.value/100;
  let shown=0;
  for(const r of rows){
    const error=failed(r);
    r.hidden=(form.errors.checked&&!error)||(below!==Infinity&&(error||+r.dataset.p>=below))||
      !texts.get(r).includes(find);
    shown+=!r.hidden;
  }
  document.querySelector("output").textContent=shown+" of "+rows.length+" shown";
  const state=new URLSearchParams();
  if(form.find.value)state.set("find",form.find.value);
  if(form.errors.checked)state.set("errors","1");
  if(form.below.value!=="")state.set("below",form.below.value);
  if(sort!=="order")state.set("sort",sort);
  history.replaceState(null,"","#"+state);
}
function order(by){
  const down=by.startsWith("-"),name=down?by.slice(1):by;
  sort=name in keys?by:"order";
  const key=keys[name in keys?name:"order"],sign=down?-1:1;
  const last=r=>name==="probability"||name==="label"?failed(r):false;
  rows.sort((a,b)=>{
    const x=key(a),y=key(b);
    return last(a)-last(b)||sign*(x<y?-1:x>y?1:0)||a.dataset.n-b.dataset.n;
  });
  const sorted=document.createDocumentFragment();
  for(const r of rows)sorted.append(r);
  body.append(sorted);
  for(const b of buttons)b.dataset.sorted=b.value!==name?"":down?"down":"up";
}
const errors=rows.filter(failed).length;
document.querySelector("#count").textContent=" ("+errors+")";
paragraphs[0].textContent=paragraphs[1].textContent+". "+paragraphs[0].textContent;
paragraphs[1].hidden=true;
const start=new URLSearchParams(location.hash.slice(1));
form.find.value=start.get("find")||"";
form.errors.checked=start.get("errors")==="1";
form.below.value=start.get("below")||"";
form.addEventListener("input",show);
form.addEventListener("submit",e=>e.preventDefault());
for(const b of buttons)
  b.addEventListener("click",()=>{order(sort===b.value?"-"+b.value:b.value);show()});
order(start.get("sort")||"order");
show();
"""


class Gallery:
    """Writes rows into an open page.

    Args:
        page: the file of the page.
    """

    def __init__(self, page: TextIO) -> None:
        self._page = page
        self._count = 0

    def write(self, prediction: PredictionWithPixels) -> None:
        """Add one row to the page; nothing of it is kept in memory."""
        (row, pixels), number = prediction, self._count
        self._count += 1
        path, also = escape(visible(row.path)), ""
        if isinstance(row, OkRow):
            assert pixels is not None
            best = row.predictions[0] if row.predictions else None
            label = escape(visible(best.label)) if best else ""
            if best and best.class_name is not None:
                also = f' data-class="{escape(visible(best.class_name))}"'
            bars = "".join(
                f'<div class="bar"><span>{_names(p)}</span>'
                f'<i style="width:{p.probability:.1%}"></i><span>{p.probability:.1%}</span></div>'
                for p in row.predictions
            )
            picture = f'<img alt="" src="{thumbnail(pixels, THUMBNAIL_PX, THUMBNAIL_QUALITY)}">'
            probability, kind = (f"{best.probability:.6f}" if best else "0"), ""
            what = bars or "no class reaches the least probability"
            if row.truth:
                wrong = "" if row.truth.rank == 1 else f", at place {row.truth.rank}"
                what += f"<div>truth: {escape(visible(row.truth.label))}{wrong}</div>"
        else:
            label, probability, kind = "", "-1", ' class="error"'
            picture, what = '<div class="none">!</div>', escape(visible(row.error))
        self._page.write(
            f'<tr{kind} data-n="{number}" data-p="{probability}" data-path="{path}" '
            f'data-label="{label}"{also}>'
            f'<td>{picture}</td><td class="path">{path}</td><td>{what}</td></tr>\n'
        )


@contextmanager
def open_gallery(path: Path, bundle: Bundle, counter: RowCounter) -> Iterator[Gallery]:
    """A page to write rows into. It is complete when this ends, also if the run ends early.

    Args:
        path: the file.
        bundle: the model, for the title.
        counter: counts the rows, for the summary.
    Raises:
        UserError: it cannot be written.
    """
    title = escape(visible(f"Predictions of {bundle.manifest.checkpoint.model}, {bundle.manifest.precision}"))
    with name_unwritable(path):
        page = path.open("w", encoding="utf-8", errors="backslashreplace")
    with page:
        page.write(
            f"{page_head(title, GENERATOR, _STYLE, _SCRIPT)}<p>Each picture is what the model saw.</p>"
            '<form><input type="search" name="find" placeholder="path or class" aria-label="path or class">'
            '<label><input type="checkbox" name="errors"> errors only<span id="count"></span></label>'
            '<label>best class below <input type="number" name="below" min="0" max="100"> %</label>'
            "<output></output></form><table><thead><tr>"
            '<th><button type="button" value="order">image</button></th>'
            '<th><button type="button" value="path">path</button></th>'
            '<th><button type="button" value="label">class</button> · '
            '<button type="button" value="probability">probability</button></th>'
            "</tr></thead><tbody>\n"
        )
        try:
            yield Gallery(page)
        finally:
            summary = escape(visible(counter.summary().sentence()))
            page.write(f"</tbody></table><p>{summary}</p><script>{_SCRIPT}</script></body></html>\n")


def page_head(title: str, generator: str, style: str, script: str) -> str:
    """The beginning of a page that names no other file and no address, up to its heading.

    Args:
        title: HTML.
        generator: the element by which pages of this kind are known.
        style: the style sheet.
        script: the one that the page may run; it stands at the end.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none';img-src data:;style-src 'unsafe-inline';script-src 'sha256-{digest}'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{generator}'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
        f"<style>{style}</style></head><body><h1>{title}</h1>"
    )


def _names(prediction: Prediction) -> str:
    """The label of a class and, where it has another, its name in the data."""
    label = escape(visible(prediction.label))
    name = prediction.class_name
    return label if name is None else f"{label} <small>{escape(visible(name))}</small>"


def thumbnail(pixels_HWC: NDArray[np.uint8], side_px: int, quality: int) -> str:
    """A square of pixels as a JPEG of at most `side_px`, as the address of an image in a page."""
    from PIL import Image

    image = Image.fromarray(pixels_HWC)
    if image.width > side_px:
        image = image.resize((side_px, side_px), Image.Resampling.BILINEAR)
    return data_address(image, "JPEG", quality=quality)


def data_address(image: Image.Image, kind: str, **options: int) -> str:
    """An encoded image as an address that holds all of it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
