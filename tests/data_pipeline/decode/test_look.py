"""A look at a file: its kind, its upright size, and whether DALI may read it."""

from __future__ import annotations

import pytest

from data_pipeline.common.errors import ImageError
from data_pipeline.common.image_kind import Kind
from data_pipeline.decode.header import read_header
from data_pipeline.decode.look import UNREADABLE, Look, is_for_pillow, look_at
from tests.helpers.images import KINDS, broken, encode, exif, huge_png, kinds, photo

NO_LIMIT = 1 << 62

# As the first word of the name of a kind says; what DALI cannot read is left to Pillow.
OF_NAME = {"jpeg": Kind.JPEG, "png": Kind.PNG, "bmp": Kind.BMP, "webp": Kind.WEBP, "tiff": Kind.TIFF,
           "gif": Kind.GIF, "pnm": Kind.PNM, "avif": Kind.AVIF, "jp2": Kind.JPEG2000, "j2k": Kind.JPEG2000,
           "ico": Kind.ICO, "tga": Kind.TGA}  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
def test_look_gives_the_upright_size(orientation: int) -> None:
    upright = (50, 30) if orientation >= 5 else (30, 50)
    for format_name, kind in (("JPEG", Kind.JPEG), ("PNG", Kind.PNG)):
        data = encode(photo(30, 50), format_name, exif=exif(orientation))
        assert look_at(data) == Look(kind, *upright, orientation, True)


@pytest.mark.parametrize("name", KINDS)
def test_look_knows_every_kind_that_is_read(name: str) -> None:
    data = kinds(30, 50)[name]
    look = look_at(data)
    assert look.kind == OF_NAME[name.split()[0]]
    assert (look.height, look.width) == read_header(data, NO_LIMIT)
    by_dali = name.split()[0] in ("jpeg", "png", "bmp") or name == "webp"
    assert look.direct == by_dali == (not is_for_pillow(data))


DAMAGED = {
    "jpeg, half": (Kind.JPEG, False),
    "jpeg, 20 bytes short": (Kind.JPEG, False),
    "jpeg, bit rot": (Kind.JPEG, False),
    "jpeg progressive, half": (Kind.JPEG, False),
    "png, 2000 bytes short": (Kind.PNG, False),
    "tiff, 500 bytes short": (Kind.TIFF, False),
    "webp, 500 bytes short": (Kind.UNREADABLE, False),
    "text": (Kind.UNREADABLE, False),
    "empty": (Kind.UNREADABLE, False),
}


@pytest.mark.parametrize("name", list(DAMAGED))
def test_look_at_a_damaged_file_never_fails(name: str) -> None:
    data = broken(30, 50)[name]
    look = look_at(data)
    assert (look.kind, look.direct) == DAMAGED[name]
    if look.kind is Kind.UNREADABLE:
        assert look == UNREADABLE
        with pytest.raises(ImageError):
            read_header(data, NO_LIMIT)
    else:
        assert (look.height, look.width) == (30, 50)


def test_look_applies_no_limit_but_that_of_its_numbers() -> None:
    assert look_at(huge_png())[:4] == (Kind.PNG, 30000, 30000, 1)
    header = encode(photo(8, 8), "BMP")
    assert look_at(header[:18] + (2**31 - 1).to_bytes(4, "little") + header[22:]).width == 2**31 - 1
    assert look_at(header[:18] + (2**31).to_bytes(4, "little") + header[22:]) == UNREADABLE


def test_look_reads_the_size_that_the_frame_header_claims() -> None:
    jpeg = bytearray(kinds(30, 50)["jpeg 4:2:0"])
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = (7).to_bytes(2, "big") + (9).to_bytes(2, "big")
    assert look_at(bytes(jpeg)) == Look(Kind.JPEG, 7, 9, 1, True)
    jpeg[at + 5 : at + 7] = b"\0\0"  # a height that would follow the scan
    assert look_at(bytes(jpeg)) == UNREADABLE
