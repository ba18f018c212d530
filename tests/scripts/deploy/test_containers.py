"""The Dockerfiles, checked without a builder: their copied files, packages, user, and what they start."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from infer.bundle.load import Bundle
from tests.helpers.infer_samples import data_folder, images_in
from tests.helpers.ranks import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DOCKERFILES = sorted((REPOSITORY / "scripts" / "deploy").glob("*Dockerfile"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
TRAINING_ONLY = {"torch", "torchvision", "nvidia", "onnx", "onnxscript", "sklearn", "tensorboard", "train"}


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, rest of its line) in order, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.M))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def sources(dockerfile: Path) -> list[str]:
    """The files and folders copied from the project, in order."""
    return [s for name, rest in instructions(dockerfile) if name == "COPY" for s in shlex.split(rest)[:-1]]


def names(requirements: list[str]) -> set[str]:
    """Names of the required packages."""
    return {Requirement(line).name for line in requirements}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_sources_exist_and_pass_dockerignore(dockerfile: Path) -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    for source in sources(dockerfile):
        assert (REPOSITORY / source).exists(), source
        assert f"!{source}" in ignored, f"{source} is kept from the builder by .dockerignore"


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_docker_images_run_as_user_1000(dockerfile: Path) -> None:
    """By number, since Kubernetes cannot tell whether a name is root's."""
    users = [rest for name, rest in instructions(dockerfile) if name == "USER"]
    assert users == ["1000:1000"]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_docker_pip_installs_pinned_extras_of_pyproject(dockerfile: Path) -> None:
    copied: set[str] = set()
    extras = ""
    num_installs = 0
    for name, rest in instructions(dockerfile):
        if name == "ARG":
            extras = rest.partition("=")[2].strip('"')
        if name == "COPY":
            copied |= set(shlex.split(rest)[:-1])
        for command in rest.split("&&") if name == "RUN" else ():
            words = shlex.split(command)
            if "install" not in words or "pip" not in words:
                continue
            num_installs += 1
            assert "--no-cache-dir" in words
            assert words[words.index("--constraint") + 1] in copied, "pip reads a file that is not there yet"
    assert num_installs == 1
    optional = PROJECT["project"]["optional-dependencies"]
    assert set(extras.replace(",", " ").split()) <= set(optional)


def test_training_image_copies_the_whole_package() -> None:
    found = sources(REPOSITORY / "scripts" / "deploy" / "train.Dockerfile")
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {pattern.rstrip("*") for pattern in setuptools["packages"]["find"]["include"]}
    modules = {f"{module}.py" for module in setuptools["py-modules"]}
    about = {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert folders | modules | about | {"pyproject.toml"} <= set(found)
    assert ("FROM", "nvidia/cuda:13.0.1-base-ubuntu24.04") in instructions(
        REPOSITORY / "scripts" / "deploy" / "train.Dockerfile"
    )


def test_list_dependencies_reads_pyproject(tmp_path: Path) -> None:
    def run(*extras: str) -> subprocess.CompletedProcess[str]:
        script = str(REPOSITORY / "scripts" / "deploy" / "list_dependencies.py")
        command = [sys.executable, script, *extras]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)

    base = run().stdout.splitlines()
    assert base == PROJECT["project"]["dependencies"]
    assert not names(base) & {"torch", "torchvision", "onnx", "nvidia-dali-cuda120"}
    assert names(run("cuda", "parquet").stdout.splitlines()) == names(base) | {"pyarrow"}
    wrong = run("cuda12")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: pyproject.toml has no extra 'cuda12'; it has train, cuda")


@pytest.mark.slow
def test_serving_image_predicts_with_its_copied_files_alone(
    base: Path, bundle: Bundle, tmp_path: Path
) -> None:
    """The copied files alone, in an interpreter that has the base dependencies and no other package."""
    app = tmp_path / "app"
    app.mkdir()
    for source in sources(REPOSITORY / "scripts" / "deploy" / "serve.Dockerfile"):
        whole = REPOSITORY / source
        copy = shutil.copytree if whole.is_dir() else shutil.copy
        copy(whole, app / whole.name)
    assert not (app / "train").exists()
    refuse = (
        "import runpy, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {TRAINING_ONLY!r}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "sys.argv[0] = 'alexnet'\n"
        "runpy.run_module('alexnet', run_name='__main__')\n"
    )
    lines = instructions(REPOSITORY / "scripts" / "deploy" / "serve.Dockerfile")
    (entry,) = (json.loads(rest) for name, rest in lines if name == "ENTRYPOINT")
    assert entry[:3] == ["python", "-m", "alexnet"]
    arguments = [str(bundle.folder) if word == "/bundle" else word for word in entry[3:]]
    images = images_in(data_folder(base) / "val")[:3]
    done = subprocess.run(
        [sys.executable, "-c", refuse, *arguments, *map(str, images), "--backend=onnx", "--device=cpu",
         "--format=jsonl"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(app)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()] == ["ok"] * 3
