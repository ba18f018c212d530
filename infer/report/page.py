"""The HTML of a report: text that is escaped, figures with captions, tables, and the page around them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.common.text import printable, visible
from infer.predict.gallery import data_address, page_head, thumbnail

GENERATOR = '<meta name="generator" content="alexnet report">'
"""By which a report is known that may be replaced."""
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
"""Distinct for the colour-blind, too. Source: Okabe and Ito 2008, "Color Universal Design"."""
JPEG_QUALITY = 85
MAX_PICTURE_PX = 160


def text(value: object) -> str:
    """A value as HTML that shows it: names of classes and files may hold anything."""
    return escape(visible(printable(str(value))))


def note(sentence: str) -> str:
    """A paragraph that says what is not shown, and why. Plain text."""
    return f'<p class="note">{text(sentence)}</p>'


def figure(content: str, caption: str, *, kind: str = "") -> str:
    """A figure with its caption.

    Args:
        content: HTML.
        caption: plain text: what one sees, with units.
        kind: a class of the style sheet.
    """
    return f'<figure class="{kind}">{content}<figcaption>{text(caption)}</figcaption></figure>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, sortable: bool = False) -> str:
    """A table of plain values; numbers stand to the right. Floats in 0..1 are for the caller to format."""
    cells = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    lines = [f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows]
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{cells}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """A table of names and their values."""
    lines = [f'<tr><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>' for name, value in rows]
    return f'<div class="scroll"><table class="facts">{"".join(lines)}</table></div>'


def _cell(value: object) -> str:
    if value is None:
        return "<td>–</td>"
    is_number = isinstance(value, int | float) or str(value).rstrip("%").replace(".", "", 1).isdigit()
    shown = f"{value:,}" if isinstance(value, int) else value
    return f"<td{' class=number' if is_number else ''}>{text(shown)}</td>"


def percent(share: float | None) -> str | None:
    """A share of 0..1 as text."""
    return None if share is None else f"{share:.1%}"


def picture(pixels_HWC: NDArray[np.uint8], alt: str) -> str:
    """An image of the page, as JPEG, at most `MAX_PICTURE_PX` wide.

    Args:
        pixels_HWC: a square of uint8 RGB.
        alt: plain text for those who do not see it.
    """
    return f'<img alt="{text(alt)}" src="{thumbnail(pixels_HWC, MAX_PICTURE_PX, JPEG_QUALITY)}">'


def drawing(pixels_HWC: NDArray[np.uint8], alt: str) -> str:
    """An image of the page with its exact pixels, as PNG, in its own size where there is room."""
    image = Image.fromarray(pixels_HWC)
    address = data_address(image, "PNG", optimize=True)
    return f'<img class="drawing" alt="{text(alt)}" width="{image.width}" src="{address}">'


def svg(content: str, alt: str, width: int, height: int, *, font_px: int) -> str:
    """A drawing of the page by its shapes; `alt` is plain text for those who do not see it."""
    return (
        f'<svg role="img" aria-label="{text(alt)}" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-size="{font_px}" fill="#1a1a1a">{content}</svg>'
    )


def bar_row(label: str, share: float, shown: str, *, color: str = BLUE, marked: bool = False) -> str:
    """A labelled bar.

    Args:
        label: plain text.
        share: its length, 0..1.
        shown: plain text behind it.
        color: of the bar.
        marked: whether the label is bold, with a tick.
    """
    name = f"<b>✓ {text(label)}</b>" if marked else text(label)
    return (
        f'<div class="bar"><span>{name}</span>'
        f'<span class="track"><i style="width:{100 * share:.1f}%;background:{color}"></i></span>'
        f"<span>{text(shown)}</span></div>"
    )


def render_page(title: str, headings: Mapping[str, str], bodies: Mapping[str, str]) -> str:
    """The whole page. It names no other file and no address, and is complete without its script.

    Args:
        title: plain text.
        headings: of the sections in their order, by the section's address behind `#`; plain text.
        bodies: of the sections; HTML.
    """
    contents = "".join(f'<li><a href="#{key}">{text(heading)}</a></li>' for key, heading in headings.items())
    parts = "".join(
        f'<section id="{key}"><h2>{text(heading)}</h2>\n{bodies[key]}</section>\n'
        for key, heading in headings.items()
    )
    return (
        f"{page_head(text(title), GENERATOR, _STYLE, _SCRIPT)}\n"
        f'<nav aria-label="Contents"><ol>{contents}</ol></nav>\n<main>\n{parts}</main>'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


_STYLE = """
:root{color-scheme:light}
body{margin:0 auto;max-width:1080px;padding:1.5rem;font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;
background:#fff}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .5rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.5rem 0 .6rem;border-top:1px solid #ccc;padding-top:1rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
p{max-width:46rem;margin:.4rem 0 .8rem}
a{color:#004f80}
nav ol{columns:17rem;column-gap:3rem;margin:0;padding-left:1.8rem}
figure{margin:1rem 0}
figcaption{color:#444;font-size:.9rem;max-width:46rem;margin-top:.4rem}
.note{background:#f3f3f3;border-left:4px solid #777;padding:.5rem .8rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));gap:1rem}
.charts figure{margin:0}
svg{max-width:100%;height:auto;display:block;font-family:system-ui,sans-serif}
.scroll{overflow-x:auto}
.scroll>svg{max-width:none}
.drawing{max-width:100%;height:auto;image-rendering:pixelated}
.cards>div{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:1.2rem 1.6rem}
.card{break-inside:avoid;font-size:.88rem;line-height:1.35}
.card p{margin:.3rem 0;overflow-wrap:anywhere}
.card img,.near img{width:128px;height:128px;object-fit:cover;border:1px solid #bbb;background:#eee}
.card .pair{display:flex;gap:.4rem}
.near td{vertical-align:top;border:0;padding:.3rem;font-size:.8rem;line-height:1.25;max-width:130px;
overflow-wrap:anywhere}
.near td:first-child{border-right:2px solid #777;padding-right:.7rem}
.near img{width:104px;height:104px;display:block}
.bars{columns:22rem;column-gap:2rem}
.bar{display:grid;grid-template-columns:minmax(5rem,9rem) minmax(4rem,1fr) 7.2rem;gap:.5rem;
align-items:center;break-inside:avoid;font-size:.85rem;line-height:1.4}
.card .bar{grid-template-columns:8rem minmax(3rem,1fr) 3.4rem}
.bar span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bar .track{background:#eee;height:.75em}
.bar i{display:block;height:100%;-webkit-print-color-adjust:exact;print-color-adjust:exact}
.bar span:last-child{font-variant-numeric:tabular-nums}
.fine .bar{font-size:.72rem;line-height:1.25}
table{border-collapse:collapse;font-size:.88rem}
th,td{text-align:left;padding:.25rem .7rem .25rem 0;border-bottom:1px solid #ddd;vertical-align:top;
overflow-wrap:anywhere}
th button{font:inherit;background:none;border:0;padding:0;cursor:pointer;color:inherit;
text-decoration:underline dotted}
.facts th{font-weight:400;color:#444}
.number{text-align:right;font-variant-numeric:tabular-nums}
pre{font-size:.8rem;overflow-x:auto;background:#f6f6f6;padding:.8rem}
summary{cursor:pointer}
@media print{
body{max-width:none;padding:0;font-size:10pt}
nav{display:none}
h2{break-after:avoid}
figure,tr{break-inside:avoid}
.long{break-inside:auto}
.scroll{overflow:visible}
.scroll>svg{max-width:100%}
svg,img{print-color-adjust:exact;-webkit-print-color-adjust:exact}
}
"""

_SCRIPT = """
for(const table of document.querySelectorAll("table.sortable")){
  const body=table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head,column)=>{
    const button=document.createElement("button");
    button.type="button";
    button.append(...head.childNodes);
    head.append(button);
    let sign=-1;
    button.addEventListener("click",()=>{
      sign=-sign;
      const rows=[...body.rows],value=row=>row.cells[column].textContent.replace(/[,%]/g,"");
      rows.sort((a,b)=>{
        const x=value(a),y=value(b),both=x!==""&&y!==""&&!isNaN(x)&&!isNaN(y);
        return sign*(both?x-y:x<y?-1:x>y?1:0);
      });
      body.append(...rows);
      for(const other of table.tHead.rows[0].cells)other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort",sign>0?"ascending":"descending");
    });
  });
}
"""
