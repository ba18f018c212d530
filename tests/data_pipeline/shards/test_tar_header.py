"""Many tar headers are compared at once as single ones are."""

from __future__ import annotations

import tarfile
from typing import Literal

import numpy as np
import pytest

from data_pipeline.common.packed_strings import PackedStrings
from data_pipeline.shards.shard_reader import header_fits, headers_fit

NAMES = ["00000001.jpg", "a/b.png", "caf\udce9.jpg", "x" * 99, "y" * 100, "d/" * 60 + "z.jpg", "", "v" * 98]


def header(
    name: str, size: int, kind: bytes = b"0", tar_format: Literal[0, 1, 2] = tarfile.USTAR_FORMAT
) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tar_format, errors="surrogateescape")[-512:]


def both(headers: list[bytes], names: list[str], sizes: list[int]) -> tuple[list[bool], list[bool]]:
    stacked = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, 512)
    many = headers_fit(stacked, PackedStrings.pack(names), np.array(sizes, dtype=np.int64))
    return many.tolist(), [header_fits(*one) for one in zip(headers, names, sizes, strict=True)]


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_sound_headers_fit(tar_format: Literal[0, 1, 2]) -> None:
    sizes = [0, 1, 511, 8**7, 10**6, 75_000, 12, 8**11 - 1]
    names = [name.replace("\udce9", "e") for name in NAMES] if tar_format == tarfile.PAX_FORMAT else NAMES
    headers = [header(name, size, tar_format=tar_format) for name, size in zip(names, sizes, strict=True)]
    many, single = both(headers, names, sizes)
    assert many == single == [True] * 8


def test_headers_of_other_members_do_not_fit() -> None:
    sound = header("a.jpg", 1000)
    cases = {
        "another name": (sound, "b.jpg", 1000),
        "a longer name": (sound, "a.jpg.jpg", 1000),
        "a shorter name": (sound, "a.jp", 1000),
        "another size": (sound, "a.jpg", 1001),
        "a folder": (header("a.jpg", 1000, tarfile.DIRTYPE), "a.jpg", 1000),
        "a link": (header("a.jpg", 1000, tarfile.SYMTYPE), "a.jpg", 1000),
        "zeros": (bytes(512), "a.jpg", 0),
        "noise": (bytes(range(256)) * 2, "a.jpg", 0),
    }
    many, single = both(*(list(column) for column in zip(*cases.values(), strict=True)))
    assert many == single == [False] * len(cases)


def test_flipped_byte_is_found_as_in_single_headers() -> None:
    random = np.random.default_rng(0)
    headers, names, sizes = [], [], []
    for number in range(4000):
        name, size = NAMES[number % len(NAMES)], int(random.integers(0, 10**6))
        changed = bytearray(header(name, size))
        changed[random.integers(0, 512)] ^= 1 << random.integers(0, 8)
        headers.append(bytes(changed))
        names.append(name)
        sizes.append(size)
    many, single = both(headers, names, sizes)
    # `int` takes a sign, an underscore or a tab in a number; the array does not, and leaves those to `read`
    assert not any(m and not s for m, s in zip(many, single, strict=True))
    assert 0 < sum(many) <= sum(single) < 400


def test_numbers_are_read_as_other_writers_fill_them() -> None:
    name, size = "a.jpg", 0o1234
    plain = bytearray(header(name, size))
    headers = []
    for field in (
        b"00000001234\0",
        b"00000001234 ",
        b"       1234 ",
        b"       1234\0",
        b"1234\0\0\0\0\0\0\0\0",
    ):
        changed = plain.copy()
        changed[124:136] = field
        changed[148:156] = b" " * 8
        total = sum(changed)
        for checksum in (b"%06o\0 " % total, b"%07o\0" % total, b"%6o\0 " % total, b"%-6o  " % total):
            changed[148:156] = checksum
            headers.append(bytes(changed))
    many, single = both(headers, [name] * 20, [size] * 20)
    assert many == single == [True] * 20
