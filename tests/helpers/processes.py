"""Reads /proc: whether processes live, and which decoded pixels they map."""

from __future__ import annotations

import re
from pathlib import Path

_PIXELS = re.compile(r" (\d+) +/memfd:pixels \(deleted\)$", re.MULTILINE)


def lives(pid: int) -> bool:
    """Whether a process has not ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in b"ZX"
    except OSError:
        return False


def shared_pixels_of(pid: int | str) -> set[int]:
    """The inodes of the `PixelStore`s that a process maps; "self" for this one."""
    try:
        return set(map(int, _PIXELS.findall(Path(f"/proc/{pid}/maps").read_text())))
    except OSError:
        return set()


def mapped_in_shm(pid: int) -> set[Path]:
    """The files in /dev/shm that a process maps."""
    return {Path(name) for name in re.findall(r" (/dev/shm/\S+)", Path(f"/proc/{pid}/maps").read_text())}


def who_maps(inodes: set[int]) -> list[int]:
    """The processes of this machine that map any of some stores."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if shared_pixels_of(pid) & inodes]
