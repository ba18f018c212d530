"""A small file system for one run, which can be filled to the last byte."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SIZE_MB = 256
"""Room for the checkpoints, 18 MB each: two kept, the best one, one in writing, and some to spare."""


@contextmanager
def filled(disk: Path) -> Iterator[int]:
    """Fill a file system to the last byte for as long as the context lasts. Yields the number of bytes."""
    assert disk.is_mount(), "only a small disk of ours is filled"
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            block = bytes(size)
            with suppress(OSError):
                while True:
                    file.write(block)
    yield filler.stat().st_size
    filler.unlink()


@contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """Mount a small tmpfs on a folder for as long as the context lasts.

    Yields:
        Nothing; or, where mounting is not allowed, the reason in one line. The folder serves either way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MB}m", "soak", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode != 0:
        yield f"mounting a small file system failed: {mounted.stderr.strip()}"
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
