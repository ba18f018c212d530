"""Names in one run of bytes behave as a sequence of str."""

from __future__ import annotations

import os

import pytest

from data_pipeline.common.packed_strings import PackedStrings


def test_packed_strings_are_a_sequence() -> None:
    names = ["a", "", "b/c.jpg", os.fsdecode(b"caf\xe9")]
    packed = PackedStrings.pack(names)
    assert list(packed) == names and [packed[i] for i in range(-4, 4)] == names + names
    assert list(packed[1:3]) == names[1:3] and "b/c.jpg" in packed and len(packed) == 4
    assert list(PackedStrings.join([packed, PackedStrings.pack([]), packed])) == names * 2
    with pytest.raises(IndexError):
        packed[4]
