"""`alexnet train` and its ranks: mistakes are one line and an exit code."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from tests.helpers.command_line import assert_one_line, invoke
from tests.helpers.ranks import TINY
from tests.helpers.warm_ranks import run_ranks, run_warm


def make_images(root: Path, source: Path, classes: dict[str, int], split: str) -> None:
    images = sorted(source.glob("val/*/*.jpg"))
    for name, count in classes.items():
        (root / split / name).mkdir(parents=True)
        for image in images[:count]:
            shutil.copy(image, root / split / name / image.name)


def test_train_refuses_wrong_options_with_code_2(tmp_path: Path) -> None:
    assert_one_line(invoke("train", "--recipe", "dem"), 2, "unknown recipe 'dem'; did you mean 'demo'?")
    assert_one_line(invoke("train", "--set", "epoch=3"), 2, "unknown key 'epoch'; did you mean 'epochs'?")
    assert_one_line(invoke("train", "--nproc", "many"), 2, "--nproc takes a number")
    assert_one_line(invoke("train", "--set", "precision=fp8"), 2, "one of auto, fp32, bf16, fp16")
    printed = invoke("train", "--print-config", "--set", "epochs=3", "--data", "x y")
    assert printed.exit_code == 0
    config = msgspec.json.decode(printed.stdout)
    assert (config["epochs"], config["data"]["root"], config["recipe"]) == (3, "x y", "demo")
    feeding = {"cache": "auto", "deterministic": False, "max_decoded_gb": 2.0}
    assert {key: config["data"][key] for key in feeding} == feeding


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train_classes", "val_classes", "message"),
    [
        (None, None, "no data folder"),
        ({"a": 2, "b": 2}, None, "no folder 'val'"),
        ({"a": 2, "b": 0}, {"a": 2, "b": 2}, "holds no images"),
        ({"a": 2}, {"a": 2}, "one class only"),
        ({"a": 2, "b": 2}, {"a": 2, "c": 2}, "only in train: b"),
        ({"a": 2, "b": 2}, {"a": 2, "b": 2}, "global_batch 64 is larger than the training set of 4 images"),
    ],
)
def test_train_refuses_unusable_data_with_code_2(
    train_classes: dict[str, int] | None,
    val_classes: dict[str, int] | None,
    message: str,
    demo_data: Path,
    tmp_path: Path,
) -> None:
    """As a rank runs it."""
    root = tmp_path / "data"
    for split, classes in (("train", train_classes), ("val", val_classes)):
        if classes is not None:
            make_images(root, demo_data, classes, split)
    done = run_ranks(1, ["train.main", f"--data={root}", "--out=runs"], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_out_that_cannot_be_written_to_is_one_line(demo_data: Path, tmp_path: Path) -> None:
    """On every rank the same, before the data is looked at."""
    (tmp_path / "file").touch()
    done = run_ranks(2, ["train.main", f"--data={demo_data}", "--out=file/runs"], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    log, error = done.stderr.splitlines()
    assert log.startswith("recipe demo")
    assert error == "error: cannot write file/runs: file is not a folder; name another folder with --out"


@pytest.mark.slow
def test_train_passes_on_the_ranks_error_line_and_code(tmp_path: Path) -> None:
    """Also where a cluster has told torchrun, which nobody asked for, to wait for another machine."""
    done = run_warm(["alexnet", "train", "--nproc=2", "--data=nowhere"], cwd=tmp_path, PET_NNODES="2")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1
    assert "no data folder nowhere" in done.stderr and "name it with --data DIR" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_train_ends_on_a_nonfinite_loss_and_saves_nothing(demo_data: Path, tmp_path: Path) -> None:
    sets = [f"--set={s}" for s in (*TINY, "schedule.learning_rate=1e6", "schedule.warmup_epochs=0")]
    done = run_ranks(1, ["train.main", f"--data={demo_data}", *sets], cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(
        r"^error: 10 steps in a row, from step \d+ on, had a gradient that is not finite", done.stderr, re.M
    )
    assert not list(tmp_path.glob("runs/*/checkpoints/step-*"))


def test_train_without_torch_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from alexnet import main\n"
        "main(['train', '--data', 'x'])"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: torch is not installed: pip install 'alexnet[train]'\n"
