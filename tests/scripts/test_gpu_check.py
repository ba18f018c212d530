"""scripts/gpu_check.sh with stubs of `nvidia-smi` and Python: its parts, its limits, and what it notes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY

PYTHON = """#!/bin/sh
case "$*" in
*"import tensorrt"*) exit 1 ;;
*doctor*) echo "a GPU" ;;
*pytest*) echo "SKIPPED [1] x.py:1: needs luck"; exit 0 ;;
*bench*) sleep 60 ;;
*) echo "no $*"; exit 3 ;;
esac
"""


def stub(path: Path, content: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    stub(tmp_path / "bin" / "python3", PYTHON)
    stub(tmp_path / "bin" / "nvidia-smi", '#!/bin/sh\necho "GPU 0: NVIDIA H100"\n')
    return Path(shutil.copy(REPOSITORY / "scripts" / "gpu_check.sh", tmp_path / "scripts"))


def run(script: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{script.parents[1] / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(script), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)


def listed(script: Path, *options: str) -> list[tuple[str, int, str]]:
    done = run(script, *options, "--list")
    assert done.returncode == 0, done.stderr
    return [(part, int(s), name) for part, s, name in map(str.split, done.stdout.splitlines())]


def test_quick_part_is_bounded_and_begins_with_the_engine(script: Path) -> None:
    quick, both = listed(script, "--quick"), listed(script)
    assert sum(limit for _, limit, _ in quick) <= 300
    assert [name for _, _, name in quick][:2] == ["train", "engine"], "an engine is made of a run"
    assert both[: len(quick)] == quick and {part for part, _, _ in both[len(quick) :]} == {"rest"}
    names = [name for _, _, name in both]
    assert len(set(names)) == len(names)
    text = script.read_text()
    assert all(f"\n{name}() {{" in text for name in names), "a function for each"
    assert listed(script, "--only", "ray") == [("rest", 120, "ray")]


def test_checks_are_noted_as_they_end(script: Path) -> None:
    done = run(script, "--installed", "--quick", "--limit", "2")
    assert done.returncode == 1
    summary = (script.parents[1] / "gpu-check" / "summary.txt").read_text().splitlines()
    assert [line.split(" (")[0] for line in summary] == [
        "FAILED  train", "skipped engine", "ok      doctor", "FAILED  gpu-tests", "CUT OFF step",
    ]  # fmt: skip
    assert summary[1] == "skipped engine (tensorrt is not installed)"
    assert "CUT OFF step (after 2 s, see gpu-check/step.log)" in summary
    assert "a GPU" in (script.parents[1] / "gpu-check" / "doctor.log").read_text()


def test_unknown_checks_and_machines_without_a_gpu_are_refused(script: Path) -> None:
    assert run(script, "--only", "nothing").returncode == run(script, "--fast").returncode == 2
    stub(script.parents[1] / "bin" / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    done = run(script, "--installed", "--only", "doctor")
    assert done.returncode == 2 and "there is nothing to check" in done.stderr
