"""Image files for tests, made in memory: one photo-like picture in every form that we promise to read."""

from __future__ import annotations

import io
import re
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageChops

from data_pipeline.common.image_kind import TargaBytes

KINDS = (
    "jpeg 4:2:0", "jpeg 4:2:2", "jpeg 4:4:4", "jpeg progressive", "jpeg gray", "jpeg cmyk, adobe",
    "jpeg cmyk, plain", "png", "png gray", "png palette", "png palette alpha", "png 1 bit",
    "png 16 bit gray", "png 16 bit rgb", "png alpha", "png gray alpha", "png turned", "bmp", "webp",
    "webp turned", "tiff", "tiff cmyk", "tiff 1 bit", "tiff turned", "gif", "pnm", "pnm plain gray",
    "pnm 1 bit", "pnm 16 bit gray", "avif", "avif turned", "jp2", "j2k", "ico", "ico bitmap", "tga",
    "jpeg turned 1", "jpeg turned 2", "jpeg turned 3", "jpeg turned 4", "jpeg turned 5", "jpeg turned 6",
    "jpeg turned 7", "jpeg turned 8", "jpeg progressive turned 8",
)  # fmt: skip
"""What `kinds` makes, in that order: names for parameters, since making the files takes a second."""

BROKEN_KINDS = (
    "jpeg, half", "jpeg, 20 bytes short", "jpeg, header only", "jpeg, bit rot", "jpeg progressive, half",
    "png, 2000 bytes short", "png, bit rot", "tiff, 500 bytes short", "webp, 500 bytes short",
    "pnm, 500 bytes short", "pnm without end of header", "avif, half", "jp2, half",
    "jp2, container of another size", "ico, half", "ico without a picture", "tga, half", "tga of text",
    "text", "empty", "png of 30000 x 30000", "pnm of 30000 x 30000", "jp2 of 30000 x 30000",
    "ico of 30000 x 30000", "tga of 30000 x 30000",
)  # fmt: skip
"""What `broken` makes."""


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture with smooth shades, edges and some noise, unlike itself under any turn or mirroring."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        127 + 120 * np.sin(x / 17 + y / 31),
        127 + 120 * np.cos(x / 23 - y / 13),
        x * 255 / width + y / 3,
    ]
    noise = np.random.default_rng(seed).normal(0, 8, (height, width, 3))
    pixels = (np.stack(waves, axis=-1) + noise + 20 * seed) % 256
    return Image.fromarray(pixels.astype(np.uint8))


def encode(image: Image.Image, format_name: str, **options: Any) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    """EXIF data that holds an orientation."""
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()


@cache
def kinds(height: int = 150, width: int = 200) -> dict[str, bytes]:
    """The same picture, by kind of file; callers share it."""
    image = photo(height, width)
    gray = image.convert("L")
    alpha = image.copy()
    alpha.putalpha(gray.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    palette = image.quantize(64)
    deep = np.asarray(gray).astype(np.uint16) * 257
    files = {
        "jpeg 4:2:0": encode(image, "JPEG", quality=90),
        "jpeg 4:2:2": encode(image, "JPEG", quality=90, subsampling=1),
        "jpeg 4:4:4": encode(image, "JPEG", quality=90, subsampling=0),
        "jpeg progressive": encode(image, "JPEG", quality=90, progressive=True),
        "jpeg gray": encode(gray, "JPEG"),
        "jpeg cmyk, adobe": encode(image.convert("CMYK"), "JPEG"),
        "jpeg cmyk, plain": _without_adobe_marker(encode(ImageChops.invert(image.convert("CMYK")), "JPEG")),
        "png": encode(image, "PNG"),
        "png gray": encode(gray, "PNG"),
        "png palette": encode(palette, "PNG"),
        "png palette alpha": encode(palette, "PNG", transparency=bytes(range(64))),
        "png 1 bit": encode(image.convert("1"), "PNG"),
        "png 16 bit gray": encode(Image.fromarray(deep), "PNG"),
        "png 16 bit rgb": _deep_png(image),
        "png alpha": encode(alpha, "PNG"),
        "png gray alpha": encode(alpha.convert("LA"), "PNG"),
        "png turned": encode(image, "PNG", exif=exif(6)),
        "bmp": encode(image, "BMP"),
        "webp": encode(image, "WEBP", lossless=True),
        "webp turned": encode(image, "WEBP", lossless=True, exif=exif(6)),
        "tiff": encode(image, "TIFF"),
        "tiff cmyk": encode(image.convert("CMYK"), "TIFF"),
        "tiff 1 bit": encode(image.convert("1"), "TIFF"),
        "tiff turned": encode(image, "TIFF", exif=exif(6)),
        "gif": encode(image, "GIF"),
        "pnm": encode(image, "PPM"),
        "pnm plain gray": _plain_pnm(gray),
        "pnm 1 bit": encode(image.convert("1"), "PPM"),
        "pnm 16 bit gray": encode(Image.fromarray(deep), "PPM"),
        "avif": encode(image, "AVIF", quality=100, subsampling="4:4:4"),
        "avif turned": encode(image, "AVIF", quality=100, subsampling="4:4:4", exif=exif(6)),
        "jp2": encode(image, "JPEG2000"),
        "j2k": encode(image, "JPEG2000", no_jp2=True),
        "ico": encode(image, "ICO", sizes=[image.size]),
        "ico bitmap": encode(image, "ICO", sizes=[image.size], bitmap_format="bmp"),
        "tga": TargaBytes(encode(image, "TGA")),
    }
    for orientation in range(1, 9):
        files[f"jpeg turned {orientation}"] = encode(image, "JPEG", quality=90, exif=exif(orientation))
    files["jpeg progressive turned 8"] = encode(image, "JPEG", progressive=True, exif=exif(8))
    assert tuple(files) == KINDS
    return files


def suffix_for(data: bytes) -> str:
    """A suffix under which a file is read as what it is: any will do, but for a Targa."""
    return ".tga" if isinstance(data, TargaBytes) else ".jpg"


def kinds_of_one_size(height: int, width: int) -> dict[str, bytes]:
    """The same kinds, where those that are stored sideways have that size once they are upright."""
    sideways = re.compile(r"turned( [5-8])?$")
    turned = {kind: data for kind, data in kinds(width, height).items() if sideways.search(kind)}
    return kinds(height, width) | turned


def _without_adobe_marker(jpeg: bytes) -> bytes:
    """Pillow writes CMYK as Adobe does: inverted, and marked so. Without the mark it is not inverted."""
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


def _plain_pnm(image: Image.Image) -> bytes:
    """As text, with a comment in the header."""
    values = " ".join(map(str, np.asarray(image).ravel().tolist()))
    return f"P2\n# by hand\n{image.width} {image.height}\n255\n{values}\n".encode()


def _deep_png(image: Image.Image) -> bytes:
    """16 bits a channel in RGB, which Pillow reads but does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    rows = (np.asarray(image).astype(">u2") * 257).astype(">u2")
    header = image.width.to_bytes(4, "big") + image.height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@cache
def broken(height: int = 150, width: int = 200) -> dict[str, bytes]:
    """Files that are no whole image, by what is wrong; callers share it."""
    jpeg = encode(photo(height, width), "JPEG", quality=90)
    progressive = encode(photo(height, width), "JPEG", quality=90, progressive=True)
    png = encode(photo(height, width), "PNG")
    jp2, side = encode(photo(height, width), "JPEG2000"), (30000).to_bytes(4, "big")
    rotten = bytearray(png)
    rotten[len(png) // 2 : len(png) // 2 + 20] = b"\x55" * 20
    files = {
        "jpeg, half": jpeg[: len(jpeg) // 2],
        "jpeg, 20 bytes short": jpeg[:-20],
        "jpeg, header only": jpeg[:300],
        "jpeg, bit rot": jpeg[: len(jpeg) // 2] + b"\xff\x24" + jpeg[len(jpeg) // 2 + 2 :],
        "jpeg progressive, half": progressive[: len(progressive) // 2],
        "png, 2000 bytes short": png[:-2000],
        "png, bit rot": bytes(rotten),
        "tiff, 500 bytes short": encode(photo(height, width), "TIFF")[:-500],
        "webp, 500 bytes short": encode(photo(height, width), "WEBP")[:-500],
        "pnm, 500 bytes short": encode(photo(height, width), "PPM")[:-500],
        "pnm without end of header": b"P6\n#" + b"x" * 5000,
        "avif, half": half(encode(photo(height, width), "AVIF")),
        "jp2, half": half(jp2),
        "jp2, container of another size": jp2.replace(
            height.to_bytes(4, "big") + width.to_bytes(4, "big"), b"\0\0\0\7\0\0\0\7", 1
        ),
        "ico, half": half(encode(photo(height, width), "ICO", sizes=[(width, height)])),
        "ico without a picture": b"\0\0\1\0\0\0",
        "tga, half": TargaBytes(half(encode(photo(height, width), "TGA"))),
        "tga of text": TargaBytes(b"this is no image at all\n" * 5),
        "text": b"this is no image at all\n" * 5,
        "empty": b"",
        "png of 30000 x 30000": huge_png(),
        "pnm of 30000 x 30000": b"P6\n30000 30000\n255\n" + bytes(100),
        "jp2 of 30000 x 30000": jp2.replace(height.to_bytes(4, "big"), side).replace(
            width.to_bytes(4, "big"), side
        ),
        "ico of 30000 x 30000": b"\0\0\1\0\1\0" + bytes(8) + struct.pack("<II", 300, 22) + huge_png(),
        "tga of 30000 x 30000": TargaBytes(bytes((0, 0, 2)) + bytes(9) + b"\x30\x75" * 2 + bytes((24, 0))),
    }
    assert tuple(files) == BROKEN_KINDS
    return files


def half(data: bytes) -> bytes:
    """The first half of a file."""
    return data[: len(data) // 2]


def huge_png() -> bytes:
    """A few kilobytes that claim 900 million pixels."""
    small = bytearray(encode(Image.new("RGB", (8, 8)), "PNG"))
    side = (30000).to_bytes(4, "big")
    small[16:24] = side + side
    crc = zlib.crc32(bytes(small[12:29]))
    small[29:33] = crc.to_bytes(4, "big")
    return bytes(small)


def write_folder(root: Path, counts: dict[str, int], side: int = 40, suffix: str = ".jpg") -> None:
    """`counts[class]` different JPEGs in each class folder of `root`."""
    number = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            number += 1
            content = _photo_jpeg(side, side + 8 * (index % 3), number)
            (root / name / f"{index:03d}{suffix}").write_bytes(content)


@cache  # many tests of a process write the same small folder
def _photo_jpeg(height: int, width: int, seed: int) -> bytes:
    return encode(photo(height, width, seed=seed), "JPEG", quality=90)


def as_numpy(images: object) -> npt.NDArray[np.int64]:
    """A batch on the host, wherever it was made."""
    if isinstance(images, np.ndarray):
        return images.astype(np.int64)
    torch = pytest.importorskip("torch")
    pixels: npt.NDArray[np.uint8] = torch.from_dlpack(images).cpu().numpy()
    return pixels.astype(np.int64)
