"""Names in one run of bytes behave as a sequence of str."""

from __future__ import annotations

import os

import numpy as np
import pytest

from data_pipeline.common.packed_strings import PackedStrings


def test_packed_strings_are_a_sequence() -> None:
    names = ["a", "", "b/c.jpg", os.fsdecode(b"caf\xe9")]
    packed = PackedStrings.pack(names)
    assert list(packed) == names and [packed[i] for i in range(-4, 4)] == names + names
    assert "b/c.jpg" in packed and len(packed) == 4
    assert list(PackedStrings.join([packed, PackedStrings.pack([]), packed])) == names * 2
    with pytest.raises(IndexError):
        packed[4]


def test_taken_strings_are_those_at_the_places() -> None:
    names = ["a", "", "b/c.jpg", os.fsdecode(b"caf\xe9")]
    packed = PackedStrings.pack(names)
    for places in ([0], [3, 0, 0, 2, 1], [], [1, 1], list(range(-3, 4))):
        assert list(packed.take(np.array(places, dtype=np.int64))) == [names[i] for i in places]
    assert list(packed) == names
    assert list(PackedStrings.pack([]).take(np.array([], dtype=np.int64))) == []
