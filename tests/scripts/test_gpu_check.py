"""scripts/gpu_check.sh with stubs of `nvidia-smi` and Python: its parts, its limits, and what it notes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import REPOSITORY
from train.config.load import make_config
from train.graphs.choose import WORTH_IMAGES

NUM_DEMO_TRAIN = 1442

PYTHON = """#!/bin/sh
case "$*" in
*"import tensorrt"*) exit 1 ;;
*doctor*) echo "a GPU" ;;
*pytest*) echo "$*" >>pytest.txt; echo "SKIPPED [1] x.py:1: $(cat why || echo needs luck)"; exit 0 ;;
*train.main*out*fast*)
  mkdir -p gpu-check/fast/run; cp step.json gpu-check/fast/run; echo '{"best": {"top1": 0.97}}' ;;
*"bench train"*"--batch 128 --only=bn"*) echo "owt_mfu 0.41"; echo "paper_vs_no_lrn not measured" ;;
*bench*) sleep 60 ;;
*train.main*) echo "no $*"; exit 3 ;;
*) exec "$REAL_PYTHON" "$@" ;;
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
    environment = {
        **os.environ,
        "REAL_PYTHON": sys.executable,
        "PATH": f"{script.parents[1] / 'bin'}:{os.environ['PATH']}",
    }
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


@pytest.mark.slow
def test_checks_are_noted_as_they_end(script: Path) -> None:
    done = run(script, "--installed", "--quick", "--limit", "2")
    assert done.returncode == 1
    summary = (script.parents[1] / "gpu-check" / "summary.txt").read_text().splitlines()
    assert [line.split(" (")[0] for line in summary] == [
        "FAILED  train", "skipped engine", "ok      doctor", "FAILED  gpu-tests", "FAILED  fast",
        "CUT OFF step",
    ]  # fmt: skip
    assert summary[1] == "skipped engine (tensorrt is not installed)"
    assert "CUT OFF step (after 2 s, see gpu-check/step.log)" in summary
    assert "a GPU" in (script.parents[1] / "gpu-check" / "doctor.log").read_text()


@pytest.mark.slow
def test_groups_of_steps_are_noted_before_one_is_cut_off(script: Path) -> None:
    run(script, "--installed", "--only", "steps", "--limit", "2")
    log = (script.parents[1] / "gpu-check" / "steps.log").read_text().splitlines()
    assert log == ["owt_mfu 0.41"]


def test_gpu_tests_begin_with_those_of_the_step(script: Path) -> None:
    (script.parents[1] / "why").write_text("needs two GPUs; there is one")
    assert run(script, "--installed", "--only", "gpu-tests").returncode == 0
    first, others = (script.parents[1] / "pytest.txt").read_text().splitlines()
    paths = [word for word in first.split() if word.startswith("tests/")]
    assert paths == [
        "tests/train/graphs", "tests/train/compile", "tests/train/kernels",
        "tests/train/test_deterministic.py",
    ]  # fmt: skip
    assert all((REPOSITORY / path).exists() for path in paths)
    assert [word for word in others.split() if "tests" in word] == [
        "tests", *(f"--ignore={path}" for path in paths),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("against", "code"), [(None, 0), ("the gradient of features.3.weight is too large", 1)]
)
def test_fast_step_that_is_wrong_fails_its_check(against: str | None, code: int, script: Path) -> None:
    verdicts = [{"name": "graph", "against": against, "seconds": None}]
    (script.parents[1] / "step.json").write_text(json.dumps({"chosen": "plain", "verdicts": verdicts}))
    assert run(script, "--installed", "--only", "fast").returncode == code
    assert '"chosen": "plain"' in (script.parents[1] / "gpu-check" / "fast.log").read_text()


def test_fast_step_is_tried_in_its_check() -> None:
    """The demo trains on enough images for a proof, which no other check of a short run does."""
    settings = re.findall(r"^  trained fast .*$", (REPOSITORY / "scripts" / "gpu_check.sh").read_text(), re.M)
    config = make_config("demo", re.findall(r"--set (\S+)", settings[0]))
    assert config.epochs * NUM_DEMO_TRAIN >= WORTH_IMAGES and config.stop_patience == 3


def test_unknown_checks_and_machines_without_a_gpu_are_refused(script: Path) -> None:
    assert run(script, "--only", "nothing").returncode == run(script, "--fast").returncode == 2
    stub(script.parents[1] / "bin" / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    done = run(script, "--installed", "--only", "doctor")
    assert done.returncode == 2 and "there is nothing to check" in done.stderr
