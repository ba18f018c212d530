"""Writing so that a file is whole or absent, and hashing to know that it still is."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_CHUNK_BYTES = 1 << 20


def sha256_of(path: Path) -> str:
    """Hash of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def fsync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file so that the path holds either the old content or the new, whole, on the disk."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_bytes(content)
    fsync_path(temporary)
    temporary.replace(path)
    fsync_path(path.parent)
