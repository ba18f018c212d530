"""The wheel in a fresh environment, run where files of the user have the names of our packages.

The environment borrows the packages of this one, so that nothing is fetched.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import msgspec
import pytest

from data_pipeline.common.start import PACKAGES
from infer.bundle.load import Bundle
from tests.helpers.ranks import COLD, REPOSITORY

SOURCES = ("alexnet.py", "pyproject.toml", "README.md", "LICENSE", *PACKAGES)
FOREIGN = "raise SystemExit('a foreign file was run')\n"


def run(command: list[object], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin/` of an environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, target = REPOSITORY / name, folder / "source" / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    quiet = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    pip = [sys.executable, "-W", "ignore", "-m", "pip"]
    build = [*pip, "wheel", *quiet, "--no-build-isolation", "--wheel-dir", folder, folder / "source"]
    done = run(build, folder)
    assert done.returncode == 0, done.stderr
    done = run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    assert done.returncode == 0, done.stderr
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    borrowed = folder / "venv/lib" / version / "site-packages/borrowed.pth"
    borrowed.write_text(sysconfig.get_paths()["purelib"] + "\n")
    (wheel,) = folder.glob("*.whl")
    # in place of an alexnet that this environment may have
    done = run([*pip, "--python", folder / "venv/bin/python", "install", "-I", *quiet, wheel], folder)
    assert done.returncode == 0, done.stderr
    return folder / "venv/bin"


@pytest.fixture
def crowded(tmp_path: Path, demo_data: Path) -> Path:
    """A folder of a user: files that have the names of our packages, and a data set `d`."""
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text(FOREIGN)
    for split in ("train", "val"):
        for klass in sorted((demo_data / split).iterdir()):
            target = tmp_path / "d" / split / klass.name
            target.mkdir(parents=True)
            for image in sorted(klass.iterdir())[:2]:
                shutil.copy(image, target)
    return tmp_path


@pytest.mark.slow
def test_wheel_trains_and_verifies_beside_foreign_files(fresh: Path, crowded: Path) -> None:
    sets = [f"--set={text}" for text in (*COLD, "epochs=1", "global_batch=10")]
    here = {"PYTHONPATH": "."}  # an entry of it comes before what is installed
    done = run([fresh / "alexnet", "train", "--data=d", *sets], crowded, **here)
    assert done.returncode == 0, done.stderr
    assert msgspec.json.decode(done.stdout)["step"] == 2
    for environment in ({}, here):
        done = run([fresh / "alexnet", "data", "verify", "d", "--workers=2"], crowded, **environment)
        assert (done.returncode, done.stderr.count("foreign")) == (0, 0), done.stderr
    done = run([fresh / "python", "-c", "from alexnet import Predictor; print(Predictor)"], crowded)
    assert (done.stdout, done.stderr) == ("<class 'infer.predictor.Predictor'>\n", "")


@pytest.mark.slow
def test_torchrun_of_the_wheel_beside_foreign_files(fresh: Path, crowded: Path) -> None:
    """`-m` looks in the working directory first, so that a train.py there is run, unless the path is safe."""
    module = ["-m", "train.main", "--print-config"]
    done = run([fresh / "python", "-u", *module], crowded)  # as torchrun starts a rank
    assert done.returncode == 1 and "a foreign file was run" in done.stderr
    if sys.version_info >= (3, 11):
        torchrun = [fresh / "python", "-m", "torch.distributed.run", "--nproc_per_node=1"]
        done = run([*torchrun, *module], crowded, PYTHONSAFEPATH="1")
        assert done.returncode == 0, done.stderr
        assert msgspec.json.decode(done.stdout)["recipe"] == "demo"
    (crowded / "train.py").unlink()
    (crowded / "train").mkdir()  # of images, perhaps
    done = run([fresh / "python", "-c", "import train; print(train.__file__)"], crowded)
    assert Path(done.stdout).parts[-3:] == ("site-packages", "train", "__init__.py\n"), done.stderr


@pytest.mark.slow
def test_wheel_brings_every_room_and_recipe(fresh: Path, tmp_path: Path) -> None:
    where = run(
        [
            fresh / "python", "-c", "import alexnet, train; print(alexnet.__file__, train.__file__);"
            "from train.pretrained.published import imagenet_classes; print(len(imagenet_classes()[0]))",
        ],
        tmp_path,
    )  # fmt: skip
    *files, num_classes = where.stdout.split()
    assert [Path(path).parts[-2] for path in files] == ["site-packages", "train"] and num_classes == "1000"
    assert str(REPOSITORY) not in where.stdout.replace(str(fresh), "")
    assert "predict" in run([fresh / "alexnet", "--help"], tmp_path).stdout
    config = run([fresh / "alexnet", "train", "--recipe", "imagenet-paper", "--print-config"], tmp_path)
    assert json.loads(config.stdout)["model"]["name"] == "paper"


@pytest.mark.slow
def test_wheel_predicts(fresh: Path, tmp_path: Path, bundle: Bundle, files: list[Path]) -> None:
    arguments = [f"--model={bundle.folder}", "--device=cpu", "--format=jsonl", *files[:2]]
    done = run([fresh / "alexnet", "predict", *arguments], tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(Path(row["path"]).name, row["status"]) for row in rows] == [(f.name, "ok") for f in files[:2]]
    assert all(len(row["predictions"]) == 5 for row in rows)
