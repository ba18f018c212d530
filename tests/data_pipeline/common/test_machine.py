"""How much memory is held, and how much may still be taken, by the kernel's files."""

from __future__ import annotations

import mmap
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.common.machine import bytes_available, resident_mb

GIB = 1 << 30


def machine(root: Path, available: int, cgroup: str, files: dict[str, object]) -> Path:
    """A machine with so many bytes available, this line in /proc/self/cgroup, and files in /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    meminfo = f"MemTotal:       {64 * GIB >> 10} kB\nMemAvailable:   {available >> 10} kB\n"
    (root / "proc/meminfo").write_text(meminfo)
    (root / "proc/self/cgroup").write_text(f"12:cpu,cpuacct:/jobs/7\n{cgroup}\n")
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def v2(folder: str, limit: object, used: int, inactive: int) -> dict[str, object]:
    stat = f"anon 5\ninactive_file {inactive}\nworkingset_refault_file 9"
    return {f"{folder}memory.max": limit, f"{folder}memory.current": used, f"{folder}memory.stat": stat}


def test_peak_of_a_process_is_not_its_parents() -> None:
    """`ru_maxrss` is at least the parent's."""
    before = resident_mb()
    with mmap.mmap(-1, 300_000_000) as filled:  # goes back to the kernel, unlike what is freed
        filled.write(bytes(len(filled)))
        assert resident_mb() > before + 250 and resident_mb(peak=True) >= resident_mb() - 1
    assert resident_mb(peak=True) > resident_mb() + 250
    program = "from data_pipeline.common.machine import resident_mb; print(resident_mb(peak=True))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 5 < float(done.stdout) < 150


def test_memory_available_is_that_of_this_machine() -> None:
    available = bytes_available()
    assert available is not None
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 1 << 20 < available < total


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/", {}, 40 * GIB),
        ("0::/", v2("", 8 * GIB, 3 * GIB, GIB), 6 * GIB),
        ("0::/", v2("", 8 * GIB, 9 * GIB, 0), 0),
        ("0::/a/b", v2("a/b/", "max", 3 * GIB, GIB), 40 * GIB),
        ("0::/a/b", v2("a/b/", "max", 2 * GIB, 0) | v2("a/", 5 * GIB, 4 * GIB, 0), GIB),
        ("0::/not/seen/here", v2("", 8 * GIB, 3 * GIB, 0), 5 * GIB),
        ("0::/", v2("", 800 * GIB, 3 * GIB, 0), 40 * GIB),
        (
            "4:memory:/a",
            {
                "memory/a/memory.limit_in_bytes": 10 * GIB,
                "memory/a/memory.usage_in_bytes": 6 * GIB,
                "memory/a/memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GIB}",
                "memory/memory.limit_in_bytes": 9223372036854771712,
                "memory/memory.usage_in_bytes": 6 * GIB,
                "memory/memory.stat": "total_inactive_file 0",
            },
            6 * GIB,
        ),
    ],
)
def test_memory_available_is_bounded_by_cgroups(
    cgroup: str, files: dict[str, object], expected: int, tmp_path: Path
) -> None:
    assert bytes_available(machine(tmp_path, 40 * GIB, cgroup, files)) == expected


def test_memory_available_is_unknown_without_proc(tmp_path: Path) -> None:
    assert bytes_available(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 5 kB\n")
    assert bytes_available(tmp_path) is None
