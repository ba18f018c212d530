"""Prediction by workers of real Ray clusters: killed, resumed on another, the rows of one process."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from alexnet import main
from data_pipeline.common.errors import UserError
from data_pipeline.common.start import PACKAGES
from infer.bundle.load import Bundle
from infer.predict.inputs import find_inputs
from infer.predict.options import PredictOptions
from infer.predictor import Predictor
from infer.ray.cluster import Share, share_cluster
from tests.helpers.images import encode, photo
from tests.helpers.infer_samples import data_folder, images_in
from tests.helpers.ranks import REPOSITORY

PART_ROWS = 3
TIMEOUT_S = 300.0


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A short path, since Ray's sockets lie below it; also what Ray's processes here are known by."""
    folder = Path(tempfile.mkdtemp(prefix="ax"))
    yield folder
    wait_for(lambda: not processes_of(folder))
    shutil.rmtree(folder)


@pytest.fixture
def start(tmp_path: Path, scratch: Path) -> Iterator[Start]:
    """Start `python …` with its pipes; of a test that fails, nothing is left for the next one.

    Ray's workers yield to all other processes by default (niceness 15): beside other tests that compute, the
    job took 281 seconds where 33 are enough.
    """
    common = {"PYTHONPATH": REPOSITORY, "TMPDIR": scratch, "HOME": scratch, "RAY_worker_niceness": 0}
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **environment: object) -> subprocess.Popen[str]:
        one = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {name: str(value) for name, value in (common | environment).items()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(one)
        return one

    yield start
    if any(one.poll() is None for one in started):
        for pid in processes_of(scratch):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    for one in started:
        with one:  # closes its pipes
            one.kill()


def processes_of(scratch: Path) -> dict[int, str]:
    """The living processes that were started with this folder as their place for temporary files."""
    found = {}
    mark = b"TMPDIR=" + os.fsencode(scratch)
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def agents_of(scratch: Path) -> set[int]:
    """Ray's agents of a machine, which look for the ended cluster for a minute, and do no more."""
    return {
        pid for pid, name in processes_of(scratch).items() if name.startswith("ray::") and "Agent" in name
    }


def kill_command(command: subprocess.Popen[str], scratch: Path) -> None:
    """Kill a command that has a cluster of its own; its workers must not outlive it for long."""
    os.kill(command.pid, signal.SIGKILL)
    out, err = command.communicate()
    assert command.returncode == -signal.SIGKILL and out == "", err
    died = time.monotonic()
    wait_for(lambda: processes_of(scratch).keys() == agents_of(scratch))
    assert time.monotonic() - died < 30, "Ray's workers outlive a command that was killed"
    for pid in agents_of(scratch):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def write_shards(folder: Path, files: list[Path]) -> list[str]:
    """Two tar shards, relative to `folder`: 12 digits, then 10 photos that take their time and 2 broken."""
    large = encode(photo(300, 400).resize((4800, 3600)), "JPEG", quality=90)
    contents = [path.read_bytes() for path in files] + [large] * 10 + [large[:3000], b""]
    for number in range(2):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for place, content in enumerate(contents[12 * number :][:12]):
                member = tarfile.TarInfo(f"{place:03d}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return ["0.tar", "1.tar"]


def assert_rows_of_one_process(rows: list[dict[str, Any]], bundle: Bundle, shards: list[Path]) -> None:
    """Check rows of 22 images and two bad files against those of a `Predictor` in this process."""
    assert [row.pop("index") for row in rows] == list(range(24))
    with Predictor(bundle.folder, device="cpu", batch_size=8) as predictor:
        expected = json.loads(msgspec.json.encode(list(predictor(find_inputs(shards)))))
    assert [row["status"] for row in rows] == ["ok"] * 22 + ["error"] * 2
    for row, one in zip(rows, expected, strict=True):
        assert str(shards[0].parent / row.pop("path")) == one.pop("path")
        best, other = row.pop("predictions", []), one.pop("predictions", [])
        probabilities = [[p.pop("probability") for p in found] for found in (best, other)]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-6)
        assert (best, row) == (other, one)


@pytest.mark.slow
def test_killed_ray_job_resumes_to_the_rows_of_one_process(
    tmp_path: Path, base: Path, bundle: Bundle, scratch: Path, start: Start
) -> None:
    files = images_in(data_folder(base) / "val")[::4][:12]
    shards = write_shards(tmp_path, files)
    for name in PACKAGES:  # Ray's workers look there first, since the driver runs there
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a foreign file was run')")
    command = [
        "-m", "alexnet", "predict", *shards, "--model", bundle.folder, "--engine", "ray", "--output", "rows",
        "--format", "jsonl", "--part-rows", PART_ROWS, "--workers", 2, "--batch-size", 2, "--device", "cpu",
    ]  # fmt: skip
    folder = tmp_path / "rows"
    killed = start(*command)
    wait_for(lambda: killed.poll() is not None or len(list(folder.glob("part-*.jsonl"))) >= 2)
    kill_command(killed, scratch)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.jsonl")}
    assert 2 <= len(before) < 8, before
    damaged = folder / max(before)
    damaged.write_bytes(damaged.read_bytes()[:-30])

    token = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    machines = start("-m", "tests.helpers.ray_machines", scratch / "ray", RAY_TMPDIR=scratch, **token)
    assert machines.stdin is not None and machines.stdout is not None
    try:
        address = machines.stdout.readline().strip()
        resumed = start(*command, "--resume", "--address", address, **token)
        wait_for(lambda: resumed.poll() is not None or len(list(folder.glob("part-*.jsonl"))) > len(before))
        pids = [pid for pid, name in processes_of(scratch).items() if name.startswith("ray::MapWorker")]
        os.kill(pids[0], signal.SIGKILL)  # another takes its place, and does its part again
        out, err = resumed.communicate(timeout=TIMEOUT_S)
    finally:
        machines.communicate(timeout=TIMEOUT_S)
    assert (resumed.returncode, out) == (3, ""), err
    assert f"--resume: {len(before) - 1} of 8 parts are there already" in err
    assert f"{damaged.name} is not whole and is predicted again" in err
    assert "2 workers, each with 1 thread" in err and "CPUExecutionProvider, fp32, on cpu" in err
    assert "http" not in err and "Traceback" not in err

    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*")}
    assert sorted(after) == [f"part-{n:06d}.jsonl" for n in range(8)]
    assert {name for name in before if after[name] == before[name]} == before.keys() - {damaged.name}
    rows = [json.loads(line) for name in sorted(after) for line in (folder / name).read_bytes().splitlines()]
    assert_rows_of_one_process(rows, bundle, [tmp_path / name for name in shards])
    summary = json.loads((folder / "_summary.json").read_bytes())
    assert summary["images"] + summary["kept"] == 24 and summary["errors"] + summary["kept_errors"] == 2
    assert not (scratch / ".ray").exists(), "nothing is left in the home folder"


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)])
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("asked", "what"), [({"device": "cuda"}, "--device cuda"), ({"backend": "trt"}, "--ba")]
)
def test_ray_refuses_a_gpu_that_the_cluster_does_not_have(asked: dict[str, Any], what: str) -> None:
    options = PredictOptions(paths=["x"], engine="ray", **asked)
    with pytest.raises(UserError, match=f"{what}.* cannot be had: the Ray cluster has no GPU"):
        share_cluster([(8, 0), (4, 0)], options)
    assert share_cluster([(8, 0), (16, 2)], options) == Share(workers=2, threads=8, gpus=1)
    assert share_cluster([(8, 0), (4, 0)], PredictOptions(paths=["x"])) == Share(workers=3, threads=4, gpus=0)


@pytest.mark.slow
def test_ray_refuses_wrong_use_before_starting_a_cluster(
    bundle: Bundle, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = images_in(data_folder(base) / "val")[0]
    ray: Any = (image, "--model", bundle.folder, "--engine", "ray")
    for options, words in {
        (): "writes a folder of parts: name it with --output DIR",
        ("--output", "rows", "--format", "csv"): "use jsonl or parquet",
        ("--output", "rows", "--html", "x.html"): "a gallery is made by one process",
        ("--output", image): "cannot write",
        ("--output", image.parent): "holds other things than a job",
    }.items():
        code, line = invoke(*ray, *options)
        assert code == 2 and words in line, line
    code, line = invoke(image, "--model", bundle.folder, "--address", "auto")
    assert code == 2 and "--address is for --engine ray" in line
    monkeypatch.setitem(sys.modules, "ray", None)
    code, line = invoke(*ray, "--output", tmp_path / "rows")
    assert code == 2 and "needs Ray: pip install 'alexnet[ray]'" in line
