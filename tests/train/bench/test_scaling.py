"""`alexnet bench scaling` and the two hosts that it can run on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest

from tests.helpers.warm_python import warm_python
from train.bench.harness import Report, describe
from train.bench.scaling import SCRIPT, bench_scaling


def two_hosts(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = ["/bin/bash", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload,no-any-return]


def why_no_hosts() -> str | None:
    """Why two hosts cannot be made here; None if they can."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"needs {tool} (Debian: apt-get install iproute2); it is not here"
    if os.getuid() != 0:
        return "network namespaces take root"
    name = f"axtest{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "this root may not make network namespaces"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


def run_with(
    program: Path, real: Callable[..., Any], command: Sequence[str], *, env: dict[str, str], **options: Any
) -> subprocess.CompletedProcess[bytes]:
    """Run a command, or the script of two hosts, with another program in place of Python."""
    words = [str(program) if word == sys.executable else word for word in command]
    done: subprocess.CompletedProcess[bytes] = real(words, env=env | {"PYTHON": str(program)}, **options)
    return done


@pytest.fixture(scope="module")
def report() -> Report:
    """Of two ranks of a small network; on two hosts as well, where they can be made."""
    links = () if why_no_hosts() else ("160mbit",)
    with (
        warm_python() as program,
        mock.patch("train.bench.scaling.subprocess.run", partial(run_with, program, subprocess.run)),
    ):
        return bench_scaling(
            variant="owt", modes=("ddp+bf16", "hybrid"), ranks=(2,), links=links, rank_batch=4, crop_px=63,
            num_classes=10, precision="fp32", device="cpu", num_rounds=1, steps=1,
            overrides=("model.hidden_units=128",),
        )  # fmt: skip


@pytest.mark.slow
def test_bench_scaling_counts_the_bytes_of_the_formulas(report: Report) -> None:
    rows = [row for row in report["rows"] if row["link"] == "loopback"]
    assert [(row["ranks"], row["mode"]) for row in rows] == [(2, "ddp"), (2, "ddp+bf16"), (2, "hybrid")]
    for row in rows:
        assert row["sent_mb"] == pytest.approx(row["formula_mb"], rel=0.01)
        assert 0 < row["efficiency"] < 3 and row["images_per_s"] == pytest.approx(8 / row["step_s"], rel=0.01)
        alone_s = rows[0]["alone_s"]  # of DDP's ranks
        assert row["efficiency"] == pytest.approx(alone_s / row["step_s"], rel=0.01)
        assert row["vs_one_rank"] is None  # one rank was not measured
    by_mode = {row["mode"]: row["sent_mb"] for row in rows}
    assert by_mode["ddp"] == pytest.approx(2 * (by_mode["ddp+bf16"] or 0), rel=0.01)
    assert msgspec.json.decode(msgspec.json.encode(report)) == report
    lines = describe(report)
    assert "rank_batch: 4" in lines and any(line.startswith("loopback      2  hybrid  ") for line in lines)


@pytest.mark.slow
@pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts()))
def test_two_hosts_have_a_wire_of_the_given_rate_and_leave_none(report: Report) -> None:
    rows = [row for row in report["rows"] if row["link"] == "160mbit"]
    assert [row["mode"] for row in rows] == ["ddp", "ddp+bf16", "hybrid"]
    for row in rows:  # the bucket lets half a megabyte through at once; the rest takes its 0.05 s a megabyte
        assert row["step_s"] > (row["sent_mb"] - 0.6) / 20
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not [name for name in left.split() if name.startswith("ax")]


@pytest.fixture
def tools() -> Iterator[Path]:
    """A folder of programs that everybody may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_two_hosts_script_says_why_it_cannot_run(tools: Path) -> None:
    arguments = ("1gbit", "1", "--", "-m", "train.main")
    done = two_hosts("1gbit")
    assert done.returncode == 2 and "netns_two_hosts.sh RATE RANKS_PER_HOST --" in done.stderr
    for tool in ("uname", "id", "sed"):
        path = shutil.which(tool)
        assert path is not None
        (tools / tool).symlink_to(path)
    done = two_hosts(*arguments, env={"PATH": str(tools)})
    assert done.returncode == 2 and done.stderr.startswith("error: no two hosts here: ip is not installed")
    for tool in ("ip", "tc"):
        (tools / tool).symlink_to("/bin/true")
    nobody = {"user": 65534} if os.getuid() == 0 else {}
    done = two_hosts(*arguments, env={"PATH": str(tools)}, cwd="/", **nobody)
    assert done.returncode == 2 and "takes root" in done.stderr
