"""Our packages are ours in every process that is started, whatever lies where Python looks first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.common.start import PACKAGES, import_own, own_command
from data_pipeline.common.workers import map_ahead
from train.bench.harness import run_alone

FOREIGN = "raise SystemExit('a foreign file was run')\n"
WITHOUT_A_PATH = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with a file of the name of each of our packages."""
    for name in PACKAGES:
        (tmp_path / f"{name}.py").write_text(FOREIGN)
    return tmp_path


@pytest.fixture
def foreign_first(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder is where this process, and each that inherits its path, looks first."""
    monkeypatch.syspath_prepend(foreign)
    monkeypatch.setenv("PYTHONPATH", str(foreign))
    yield foreign


def run_python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[3]
    code = f"import sys; sys.path.append({str(root)!r}); {code}"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=WITHOUT_A_PATH, capture_output=True, text=True
    )


def test_python_interface_is_ours_beside_foreign_files(foreign: Path) -> None:
    code = "from alexnet import Predictor; import data_pipeline; print(Predictor.__module__, end='')"
    done = run_python(code, foreign)
    assert (done.stdout, done.stderr) == ("infer.predictor", "")
    (foreign / "train.py").write_text("x = 7")  # not needed by it, so the script's own
    done = run_python("import alexnet; alexnet.load_bundle; import train; print(train.x, end='')", foreign)
    assert (done.stdout, done.stderr) == ("7", "")


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["train", "--print-config"], ["predict", "-h"], ["data", "-h"]])
def test_command_line_is_ours_beside_foreign_files(arguments: list[str], foreign: Path) -> None:
    done = run_python(f"from alexnet import main; main({arguments})", foreign)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_name_that_is_taken_already_is_an_import_error(foreign: Path) -> None:
    (foreign / "infer.py").write_text("x = 1")
    done = run_python("import infer; from alexnet import Predictor", foreign)
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: a module of the name infer is imported already, from {foreign / 'infer.py'}, and "
        "alexnet has one of that name: rename yours"
    )
    import_own(*PACKAGES)  # here they are ours, and stay


def test_packages_below_are_ours_too(foreign: Path) -> None:
    (foreign / "train.py").unlink()
    done = run_python("import train.config.schema as s; print(s.RunConfig().epochs, end='')", foreign)
    assert (done.stdout, done.stderr) == ("90", "")


@pytest.mark.slow
def test_processes_of_ours_start_in_a_foreign_folder(foreign_first: Path) -> None:
    command = own_command("data_pipeline.inspect.verify:_check")
    done = subprocess.run(command, cwd=foreign_first, capture_output=True, text=True)
    assert (
        done.stderr.splitlines()[-1] == "TypeError: _check() missing 1 required positional argument: 'task'"
    )
    assert sorted(map_ahead(abs, [-1, -2, -3], 2)) == [1, 2, 3]
    assert run_alone(os.getppid) == os.getpid()


@pytest.mark.slow
def test_spawned_from_a_process_of_ours(foreign_first: Path) -> None:
    """Multiprocessing runs the main file of the parent in the child, before anything else."""
    done = subprocess.run(
        [*own_command("tests.data_pipeline.common.test_start:print_squares"), "7"],
        cwd=foreign_first, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": f"{foreign_first}:{Path(__file__).parents[3]}"},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("[4, 9, 7]", "")


def print_squares() -> None:
    squares = list(map_ahead(square, [2, 3], 2))
    print([*squares, int(sys.argv[1])], end="")  # noqa: T201


def square(number: int) -> int:
    import train

    assert "trainer" in str(train.__doc__)
    return number**2
