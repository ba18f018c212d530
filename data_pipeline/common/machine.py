"""The cores, the memory and the memory allocator of this process, and what is installed for it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def usable_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed_version(distribution: str) -> str | None:
    """The version of a package that is installed, by the name under which it is published; else None."""
    from importlib import metadata  # takes longer to import than most commands need

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def bytes_available(root: Path = Path("/")) -> int | None:
    """Memory that this process may still take: what the machine has left, or its cgroups if that is less.

    The cache of files counts as free, since the kernel gives it up. Swap does not count.

    Args:
        root: where `proc` and `sys` are.
    Returns:
        Bytes, >= 0; None where it is not known: not Linux, or no /proc.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        left = min(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError):
        return None
    return max(0, min([left, *_left_in_cgroups(root)]))


def resident_mb(*, peak: bool = False) -> float:
    """Return the memory that this process holds, or has held at most, in MB. Linux.

    Not `ru_maxrss` of `getrusage`: that of a process that was started is at least its parent's.
    """
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key))


_CGROUPS = (
    # controller, folder, limit, use, and which of that is for files that nobody has read lately
    ("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "memory",
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes left in this process's cgroup and in each above it; a limit that cannot be read is none."""
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller, folder, limit, used, reclaimable in _CGROUPS:
                if controller not in controllers.split(","):
                    continue
                # a container may see its own cgroup as the top, and yet be told the path from the machine's
                group = Path("/", path)
                for level in (group, *group.parents):
                    with suppress(OSError, ValueError):  # "max" is no number
                        there = root / folder / level.relative_to("/")
                        free = int((there / limit).read_text()) - int((there / used).read_text())
                        yield free + _stat_at(there / "memory.stat", reclaimable)


def _stat_at(path: Path, key: str) -> int:
    lines = path.read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)


_M_ARENA_MAX = -8  # malloc.h
_NUM_ARENAS = 2


def share_memory_arenas() -> None:
    """Let the threads of this process share glibc's arenas; with another C library, do nothing.

    With an arena for each thread, images that one thread decodes and another frees fragment the memory: a
    loader grew from 320 to 450 MB over 96,000 images. With shared arenas it does not grow.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _NUM_ARENAS)
