"""The scripts of docs/examples, run as a reader would run them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
import torchvision
from PIL import Image

from tests.helpers.ranks import REPOSITORY

EXAMPLES = REPOSITORY / "docs" / "examples"
pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    """That of a shell in which the package is installed."""
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def few(source: Path, target: Path, counts: dict[str, int]) -> Path:
    """So many images of each class and split of the demo data."""
    for split, count in counts.items():
        for folder in sorted((source / split).iterdir()):
            (target / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copy(image, target / split / folder.name)
    return target


def test_examples_train_export_predict(tmp_path: Path, demo_data: Path) -> None:
    """A short run of a small network: it learns nothing yet, but each step finds what the last one wrote."""
    few(demo_data, tmp_path / "digits", {"train": 16, "val": 12})
    script = str(EXAMPLES / "train_export_predict.py")
    done = subprocess.run(
        [sys.executable, script, "data.root=digits", "epochs=2", "model.hidden_units=64"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2: validation loss" in done.stderr
    runs_on, *rows = done.stdout.splitlines()
    assert runs_on.startswith("ONNX Runtime")
    row = re.compile(r"digits/val/\d/\d+\.jpg( \d [\d.]+%){3}")
    assert [bool(row.fullmatch(line)) for line in rows] == [True] * 4, done.stdout  # every 30th of 120
    [manifest] = tmp_path.glob("runs/demo-*/export/onnx-fp32/bundle.json")
    assert json.loads(manifest.read_text())["report"]["num_images"] == 120


def test_examples_serve_torchvision(tmp_path: Path, demo_data: Path) -> None:
    """Weights of torchvision's own class, made here: what is served is what torchvision computes."""
    torch.manual_seed(0)
    theirs = torchvision.models.alexnet(num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    data = few(demo_data, tmp_path / "digits", {"val": 2})
    image = sorted(data.glob("val/7/*.jpg"))[0]
    with served("weights.pth", "digits", "0", cwd=tmp_path) as address:
        status, row = post(address, image.read_bytes())
        refused, reason = post(address, b"no image")
    assert (status, row["path"], len(row["predictions"])) == (200, "request", 5)
    with Image.open(image) as opened, torch.inference_mode():
        transform = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.transforms()
        expected = torch.softmax(theirs(transform(opened.convert("RGB"))[None]), dim=1)[0]
    for prediction in row["predictions"]:
        assert prediction["label"] == str(prediction["class_id"])
        assert prediction["probability"] == pytest.approx(float(expected[prediction["class_id"]]), abs=1e-4)
    assert (refused, reason["status"]) == (400, "error")
    assert "not an image of a known format" in reason["error"]


@contextmanager
def served(*arguments: str, cwd: Path) -> Iterator[str]:
    """The address at which the example serves, until the block ends."""
    log = cwd / "stderr.txt"  # a file, so that a full pipe does not stop the server
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, str(EXAMPLES / "serve_torchvision.py"), *arguments],
            cwd=cwd,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, log.read_text()
            yield line.split()[0]
        finally:
            process.kill()


def post(address: str, body: bytes) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    try:
        with urllib.request.urlopen(address, data=body, timeout=60) as response:
            return response.status, json.loads(response.read())
    except HTTPError as error:
        with error:
            return error.code, json.loads(error.read())
