"""Parts that checkpoints and bundles share: the weights that a run began with, and parts of model cards.

In a card are Markdown that no name breaks, YAML, the licence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import msgspec

from data_pipeline.common.text import printable, visible

CARD_NAME = "README.md"
WEIGHTS_NAME = "model.safetensors"
MAX_NAMES = 20
"""So many classes are named in a card; the others are counted."""


class InitRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The weights from elsewhere that a run began with; tensors by name.

    Attributes:
        source: what they were.
        sha256: of the file, or of the checkpoint's state.
        loaded: tensors that were taken over.
        made_anew: tensors that the source has not for these classes, with their initial values.
        unused: tensors of the source that were not taken over.
        differences: what else is not as it was in the source, a text for each.
    """

    source: str
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    loaded: tuple[str, ...]
    made_anew: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    def words(self) -> str:
        """`began with runs/…/step-00000005: 14 tensors loaded, 2 made anew, 2 left unused`."""
        anew = f", {len(self.made_anew)} made anew" if self.made_anew else ""
        unused = f", {len(self.unused)} left unused" if self.unused else ""
        return f"began with {self.source}: {len(self.loaded)} tensors loaded{anew}{unused}"


def code(text: str, *, in_table: bool = False) -> str:
    r"""A name from a user as a code span, in which Markdown, HTML and links mean nothing.

    Args:
        text: the name.
        in_table: whether it is for a cell of a table, where a bar parts cells even inside code.

    >>> code("cat`s <b>"), code("a|b", in_table=True), code("")
    ('``cat`s <b>``', '`a\\|b`', '(empty)')
    """
    shown = visible(printable(text))
    if in_table:
        shown = shown.replace("|", "\\|")
    if not shown.strip():
        return f"({len(shown)} spaces)" if shown else "(empty)"
    fence = "`" * (max(map(len, re.findall("`+", shown)), default=0) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def codes(names: Sequence[str]) -> str:
    """Names as code spans, of many the first `MAX_NAMES`."""
    more = len(names) - MAX_NAMES
    return ", ".join(map(code, names[:MAX_NAMES])) + (f" and {more:,} more" if more > 0 else "")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the cells are Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def front_matter(name: str, data: str, metrics: Mapping[str, float]) -> str:
    """The YAML at the top of a card, as Hugging Face's hub reads it.

    Args:
        name: of the model.
        data: name of the data.
        metrics: accuracies in 0..1 by name; none for a model that was not evaluated.
    Source: Hugging Face, "Model Cards", the model card metadata and `model-index`.
    """
    keys = {
        "license": _quoted("other"),
        "license_name": _quoted("terms-of-the-training-data"),
        "pipeline_tag": _quoted("image-classification"),
        "tags": json.dumps(["alexnet", "image-classification", "onnx", "safetensors"]),
    }
    if metrics:
        found = ", ".join(
            f'{{"type": "accuracy", "name": {_quoted(key)}, "value": {value:.6f}}}'
            for key, value in metrics.items()
        )
        keys["metrics"] = json.dumps(["accuracy"])
        keys["model-index"] = (
            f'[{{"name": {_quoted(name)}, "results": [{{"task": {{"type": "image-classification"}}, '
            f'"dataset": {{"name": {_quoted(data)}, "type": {_quoted(data)}}}, "metrics": [{found}]}}]}}]'
        )
    return "".join(["---\n", *(f"{key}: {value}\n" for key, value in keys.items()), "---\n"])


def _quoted(text: str) -> str:
    """A string of YAML, of which JSON's are a part where they hold no control character and no surrogate."""
    return json.dumps(visible(printable(text)), ensure_ascii=False)


def named_accuracies(metrics: Mapping[str, float]) -> dict[str, float]:
    """Top-1 and top-5 in 0..1 under the names that cards use, of a checkpoint's metrics; those there are."""
    named = {"top1": "top-1", "top5": "top-5"}
    return {words: metrics[key] for key, words in named.items() if key in metrics}


def licence_section(data: str) -> str:
    """The section on the licences of code and weights.

    Args:
        data: name of the data that the weights were computed from; empty where it is not known.
    """
    images = f"the images of {code(data)}" if data else "images that their publisher names"
    return (
        "## Licence\n\n"
        "The code that trained and exported this model is under the Apache License 2.0. That says nothing "
        f"about the weights: they were computed from {images}, and whether and how they may be used and "
        "passed on is decided by the terms of those images, which this card does not know. Look them up "
        "first."
    )
