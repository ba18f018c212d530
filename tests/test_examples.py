"""The scripts of docs/examples, run as a reader would run them, in this process, which has torch loaded."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import HTTPServer
from pathlib import Path
from queue import Queue
from typing import Any
from unittest import mock
from urllib.error import HTTPError

import pytest
import torch
import torchvision
from PIL import Image

from tests.helpers.ranks import REPOSITORY
from tests.helpers.thin_networks import thin_networks

EXAMPLES = REPOSITORY / "docs" / "examples"
pytestmark = pytest.mark.slow


def run_example(name: str, *arguments: str) -> None:
    """Run a script of docs/examples from the working directory."""
    with mock.patch.object(sys, "argv", [name, *arguments]):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def few(source: Path, target: Path, counts: dict[str, int]) -> Path:
    """So many images of each class and split of the demo data."""
    for split, count in counts.items():
        for folder in sorted((source / split).iterdir()):
            (target / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copy(image, target / split / folder.name)
    return target


def test_examples_train_export_predict(
    tmp_path: Path, demo_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A short run of a small network: it learns nothing yet, but each step finds what the last one wrote."""
    few(demo_data, tmp_path / "digits", {"train": 7, "val": 12})
    monkeypatch.chdir(tmp_path)
    with thin_networks():
        run_example(
            "train_export_predict.py",
            "data.root=digits",
            "epochs=2",
            "model.hidden_units=64",
            "cpu_threads=1",
        )
    done = capsys.readouterr()
    assert "epoch 2/2: validation loss" in done.err
    runs_on, *rows = done.out.splitlines()
    assert runs_on.startswith("ONNX Runtime")
    row = re.compile(r"digits/val/\d/\d+\.jpg( \d [\d.]+%){3}")
    assert [bool(row.fullmatch(line)) for line in rows] == [True] * 4, done.out  # every 30th of 120
    [manifest] = tmp_path.glob("runs/demo-*/export/onnx-fp32/bundle.json")
    assert json.loads(manifest.read_text())["report"]["num_images"] == 120


def test_examples_serve_torchvision(
    tmp_path: Path, demo_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of torchvision's own class, made here: what is served is what torchvision computes."""
    torch.manual_seed(0)
    theirs = torchvision.models.alexnet(num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    data = few(demo_data, tmp_path / "digits", {"val": 1})
    image = sorted(data.glob("val/7/*.jpg"))[0]
    monkeypatch.chdir(tmp_path)
    with served("weights.pth", "digits", "0", monkeypatch=monkeypatch) as port:
        address = capsys.readouterr().out.split()[0]
        assert address == f"http://127.0.0.1:{port}/"
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
def served(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port at which the example serves, in a thread until the block ends."""
    servers: Queue[HTTPServer] = Queue()

    class Known(HTTPServer):
        """Says that it serves."""

        def serve_forever(self, poll_interval: float = 0.01) -> None:
            servers.put(self)
            super().serve_forever(poll_interval)

    monkeypatch.setattr("http.server.HTTPServer", Known)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(run_example, "serve_torchvision.py", *arguments)
        while servers.empty():
            assert not done.done(), done.exception()
            time.sleep(0.05)
        server = servers.get()
        try:
            yield server.server_port
        finally:
            server.shutdown()


def post(address: str, body: bytes) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    try:
        with urllib.request.urlopen(address, data=body, timeout=60) as response:
            return response.status, json.loads(response.read())
    except HTTPError as error:
        with error:
            return error.code, json.loads(error.read())
