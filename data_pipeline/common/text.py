"""Makes paths and labels printable, for terminals and logs."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Collection, Iterable


def printable(path: str | os.PathLike[str]) -> str:
    r"""A path as text that any stream can print: bytes that are not UTF-8 are shown as \xNN.

    >>> printable("caf\udce9.jpg")
    'caf\\xe9.jpg'
    """
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def visible(text: str) -> str:
    r"""Text from file names and labels, with control characters escaped, which a terminal would obey.

    >>> visible("a\x1b[31m.jpg")
    'a\\x1b[31m.jpg'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def composed(name: str) -> str:
    r"""A name in Unicode normalisation form NFC, for comparisons. macOS gives out some names in form NFD.

    >>> composed("cafe\u0301") == "caf\xe9"
    True
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def spelled_as(names: Iterable[str], known: Collection[str]) -> list[str]:
    r"""Names in the spelling of those among which they are looked for, if only their normalisation differs.

    >>> spelled_as(["cafe\u0301", "tea"], ["caf\xe9"]) == ["caf\xe9", "tea"]
    True
    """
    exact, by_form = set(known), {composed(name): name for name in known}
    return [name if name in exact else by_form.get(composed(name), name) for name in names]
