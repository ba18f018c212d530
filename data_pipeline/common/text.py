"""Makes paths and labels printable, for terminals and logs."""

from __future__ import annotations

import os


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
