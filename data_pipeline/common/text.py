"""Text: paths and labels made printable, for terminals and logs; and the text files that users write."""

from __future__ import annotations

import codecs
import os
import unicodedata
from collections.abc import Collection, Iterable

from data_pipeline.common.errors import UserError

_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""By the mark at their beginning; the longer marks first, since one begins with another."""


def without_mark(data: bytes, name: str | os.PathLike[str]) -> bytes:
    r"""The beginning of a text file without the byte order mark, which editors on Windows write.

    Args:
        data: the first bytes, or all.
        name: of the file, for the message.
    Raises:
        UserError: the mark of an encoding that is not read.

    >>> without_mark(b"\xef\xbb\xbfcat", "words.txt")
    b'cat'
    """
    for mark, encoding in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise UserError(f"{printable(name)} is text in {encoding}: save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def text_lines(data: bytes, name: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file that a user wrote. Bytes that are not UTF-8 stay, as in the name of a file.

    Only line ends part lines, with or without a carriage return: `str.splitlines` parts them at rarer
    characters too, which names may hold.

    Raises:
        UserError: see `without_mark`.
    """
    text = without_mark(data, name).decode("utf-8", "surrogateescape")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def names_in(data: bytes, file: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of classes in a text file, one a line, in their order. Empty lines at the end do not count.

    Raises:
        UserError: no name, an empty line between names, which would shift those after it; or `without_mark`.

    >>> names_in(b"cat\\nred fox\\n\\n", "classes.txt")
    ('cat', 'red fox')
    """
    names = [line.strip() for line in text_lines(data, file)]
    while names and not names[-1]:
        names.pop()
    if not names:
        raise UserError(f"{printable(file)} holds no names")
    if "" in names:
        raise UserError(f"{printable(file)} line {names.index('') + 1} is empty: name a class in each line")
    return tuple(names)


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
