"""The sample table: 19 bytes a sample, and no value is taken that no look at a file gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_pipeline.datasets.sample_table import ROW_BYTES, SampleTable

COLUMNS: dict[str, list[int]] = {
    "lengths": [900, 0, 2**40],
    "heights": [30, 1, 2**31 - 1],
    "widths": [50, 1, 7],
    "kinds": [1, 0, 6],
    "orientations": [8, 1, 3],
    "direct": [1, 0, 0],
}


def values(table: SampleTable) -> list[Any]:
    return [
        table.lengths.tolist(), table.sizes.tolist(), table.kinds.tolist(), table.orientations.tolist(),
        table.direct.tolist(),
    ]  # fmt: skip


def test_table_survives_packing_in_nineteen_bytes_a_sample() -> None:
    table = SampleTable.from_columns(**COLUMNS)
    assert values(table) == [
        [900, 0, 2**40], [[30, 50], [1, 1], [2**31 - 1, 7]], [1, 0, 6], [8, 1, 3], [True, False, False]
    ]  # fmt: skip
    packed = table.pack()
    assert len(packed) == 3 * ROW_BYTES == 57
    again = SampleTable.unpack(packed)
    assert values(again) == values(table) and again.pack() == packed
    types = [(a.dtype.name, a.shape) for a in (again.lengths, again.sizes, again.kinds, again.direct)]
    assert types == [("int64", (3,)), ("int32", (3, 2)), ("uint8", (3,)), ("bool", (3,))]
    assert len(SampleTable.unpack(b"")) == 0


def test_table_is_read_only_and_taken_in_any_order() -> None:
    table = SampleTable.from_columns(**COLUMNS)
    for made in (table, SampleTable.unpack(table.pack()), table.take(np.array([0]))):
        with pytest.raises(ValueError, match="read-only"):
            made.sizes[0] = 9
    part = table.take(np.array([2, 0]))
    assert part.lengths.tolist() == [2**40, 900] and part.sizes.tolist() == [[2**31 - 1, 7], [30, 50]]
    joined = SampleTable.join([part, table.take(np.array([1]))])
    assert values(joined) == values(table.take(np.array([2, 0, 1])))


HOSTILE = {
    "lengths": ([-1], "a length is not within 0"),
    "heights": ([0, 2**31, -5], "a size is not within 1"),
    "widths": ([0, 2**40, -(2**31)], "a size is not within 1"),
    "kinds": ([12, -1, 256], "a kind is not within 0..11"),
    "orientations": ([0, 9, 257], "an orientation is not within 1..8"),
    "direct": ([2, -1, 256], "what DALI may read is not within 0..1"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_value_that_no_look_gives_is_refused(name: str) -> None:
    bad, reason = HOSTILE[name]
    for value in bad:
        columns = {key: list(column) for key, column in COLUMNS.items()}
        columns[name][2] = value
        with pytest.raises(ValueError, match=reason):
            SampleTable.from_columns(**columns)
    with pytest.raises(ValueError, match=r"int too big|too large"):
        SampleTable.from_columns(**(COLUMNS | {name: [1, 1, 2**70]}))
    with pytest.raises(ValueError, match="inhomogeneous"):
        SampleTable.from_columns(**(COLUMNS | {name: [1, 1]}))


def test_packed_table_that_is_crafted_is_refused() -> None:
    packed = SampleTable.from_columns(**COLUMNS).pack()
    with pytest.raises(ValueError, match="56 bytes are no whole rows of 19"):
        SampleTable.unpack(packed[:-1])
    for at, value, reason in (
        (7, 0x80, "a length"),  # the sign
        (24, 0, "a size"),
        (48, 12, "a kind"),
        (51, 9, "an orientation"),
        (54, 2, "what DALI may read"),
        (55, 1, "a sample that cannot be read is marked for DALI"),
    ):
        crafted = bytearray(packed)
        crafted[at] = value
        with pytest.raises(ValueError, match=reason):
            SampleTable.unpack(bytes(crafted))
