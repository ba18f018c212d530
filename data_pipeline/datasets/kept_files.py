"""Keeps files between runs beside the data: in its folder or, if that is read-only, in the user's cache.

Each begins with the SHA-256 of what follows. That finds damage; it does not prove who wrote the file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from data_pipeline.common.files import user_cache
from data_pipeline.common.text import printable

log = logging.getLogger("data_pipeline")

CACHE_FOLDER = ".alexnet"
_HASH_BYTES = 32


def kept_files(root: Path, name: str) -> Iterator[tuple[Path, memoryview | None]]:
    """Read the kept files of a name, from each place that has one.

    Args:
        root: the data folder.
        name: the file's name, in `.alexnet/` of the data folder or in the user's cache.
    Yields:
        A path and its content; None for the content of a file that is damaged.
    """
    for path in _places(root, name):
        try:
            content = path.read_bytes() if path.is_file() else None
        except OSError:
            continue
        if content is not None:
            body = memoryview(content)[_HASH_BYTES:]
            yield path, body if hashlib.sha256(body).digest() == content[:_HASH_BYTES] else None


def keep_file(root: Path, name: str, content: bytes, what: str, num_images: int) -> None:
    """Keep a file in the first place that can be written, whole or not at all; log where, or that none can.

    Args: as `kept_files`, and
        content: its content.
        what: what it is, for the log.
        num_images: how many images it is of, for the log.
    """
    for path in _places(root, name):
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, hashlib.sha256(content).digest() + content)
            log.info("%s of %d images kept in %s", what, num_images, printable(path))
            return
    log.info("the %s could not be kept: neither the data folder nor the user's cache can be written", what)


def user_place(root: Path, name: str) -> Path | None:
    """Where the user's cache keeps a file of a data folder; None for a user without a cache, or a home."""
    identity = hashlib.sha256(os.fsencode(Path(root).resolve())).hexdigest()[:16]
    with suppress(OSError):
        return user_cache() / identity / name
    return None


def _places(root: Path, name: str) -> Iterator[Path]:
    yield Path(root) / CACHE_FOLDER / name
    if (elsewhere := user_place(root, name)) is not None:
        yield elsewhere


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole, also when several ranks do so at once."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
