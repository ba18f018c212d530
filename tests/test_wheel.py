"""The package as it is installed from a wheel, away from the repository."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from infer.bundle.load import Bundle
from tests.helpers.environments import clean_environ, make_environment, run_pip
from tests.helpers.ranks import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.network]

SOURCES = ("alexnet.py", "pyproject.toml", "README.md", "LICENSE", "data_pipeline", "train", "infer")
Run = Callable[..., str]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of an environment with the wheel; what it depends on is borrowed from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"  # setuptools writes beside them
    sources.mkdir()
    for name in SOURCES:
        if (REPOSITORY / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / name, sources / name, ignore=ignored)
        else:
            shutil.copy(REPOSITORY / name, sources)
    done = run_pip("wheel", "--no-deps", f"--wheel-dir={folder}", str(sources))
    assert done.returncode == 0, done.stderr
    (wheel,) = folder.glob("alexnet-*.whl")
    python = make_environment(folder / "fresh", str(wheel), borrow=True)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()

    def run(program: str, *arguments: str) -> str:
        command = [str(python.with_name(program)), *arguments]
        done = subprocess.run(
            command, cwd=elsewhere, env=clean_environ(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_wheel_brings_every_room_and_recipe(installed: Run) -> None:
    where = installed("python", "-c", "import alexnet, train; print(alexnet.__file__, train.__file__)")
    assert [Path(path).parts[-2] for path in where.split()] == ["site-packages", "train"]
    assert str(REPOSITORY) not in where
    assert "predict" in installed("alexnet", "--help")
    config = json.loads(installed("alexnet", "train", "--recipe", "imagenet-paper", "--print-config"))
    assert config["model"]["name"] == "paper"


def test_wheel_predicts(installed: Run, bundle: Bundle, files: list[Path]) -> None:
    arguments = [f"--model={bundle.folder}", "--device=cpu", "--format=jsonl", *map(str, files[:2])]
    rows = [json.loads(line) for line in installed("alexnet", "predict", *arguments).splitlines()]
    assert [(Path(row["path"]).name, row["status"]) for row in rows] == [(f.name, "ok") for f in files[:2]]
    assert all(len(row["predictions"]) == 5 for row in rows)
