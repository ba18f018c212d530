"""Text files that users write: with the marks of Windows editors, and with names that are no UTF-8."""

from __future__ import annotations

import codecs
import os

import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import text_lines, without_mark


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert text_lines(codecs.BOM_UTF8 + "Bär\r\ncat\n".encode(), "f") == ["Bär", "cat"]
    assert text_lines(codecs.BOM_UTF8, "f") == text_lines(b"", "f") == []
    assert without_mark(b"cat\xef\xbb\xbf", "f") == b"cat\xef\xbb\xbf", "only at the beginning"


@pytest.mark.parametrize(
    ("encoding", "said"), [("utf-16", "UTF-16"), ("utf-16-be", "UTF-16"), ("utf-32", "UTF-32")]
)
def test_another_encoding_is_named_with_what_to_do(encoding: str, said: str) -> None:
    data = ("\ufeff" if encoding == "utf-16-be" else "") + "cat\n"
    with pytest.raises(UserError, match=rf"^words.txt is text in {said}: save it as UTF-8$"):
        text_lines(data.encode(encoding), "words.txt")


def test_only_line_ends_part_lines() -> None:
    rare = "a\x0bb\x1cc\x85d\u2028e"
    assert text_lines(f"{rare}\n\n two \n".encode(), "f") == [rare, "", " two "]
    assert text_lines(b"caf\xe9\nlast", "f") == [os.fsdecode(b"caf\xe9"), "last"]
