"""`alexnet export torchvision`: from the published file on a server to predicted rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor
from torchvision.models import AlexNet_Weights

from alexnet import main
from data_pipeline.datasets.demo import read_photographs
from infer.export.gate import photograph_windows
from tests.helpers.http_server import serving
from tests.helpers.published import CROP_PX, publish_small
from train.config.schema import RunConfig
from train.models.alexnet import make_model

Exported = tuple[Path, dict[str, Any], list[str | None], RunConfig, dict[str, Tensor]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The folder of an export over a connection that breaks off once, its manifest, the ranges asked for, and
    the network with its weights. No test makes it: torch's exporter sets environment variables."""
    folder = tmp_path_factory.mktemp("torchvision")
    with serving() as server, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        config, weights = publish_small(server, monkeypatch, folder / "cache")
        server.mode = "breaks off"
        mirror = f"http://127.0.0.1:{server.server_port}/mirror"
        shown = CliRunner().invoke(main, ["export", "torchvision", "--mirror", mirror, "--json"])
        assert shown.exit_code == 0, shown.output
        return folder, msgspec.json.decode(shown.stdout), server.asked, config, weights


@pytest.mark.slow
def test_torchvisions_weights_are_fetched_and_predict(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are those of torchvision's own preprocessing."""
    folder, manifest, asked, config, weights = exported
    monkeypatch.chdir(folder)
    image = folder / "photo.jpg"
    read_photographs()["flower.jpg"].save(image, quality=95)
    assert asked == [None, "bytes=1000000-"]
    assert manifest["classes"][:2] == ["n01440764", "n01443537"] and len(manifest["classes"]) == 1000
    assert manifest["labels_text"][281] == "tabby"
    gate = manifest["report"]
    assert (gate["data"], gate["split"]) == ("china.jpg and flower.jpg of scikit-learn", "windows")
    assert (gate["num_images"], gate["checkpoint_accuracy"], gate["onnx"]["accuracy"]) == (64, None, None)
    assert gate["onnx"]["max_probability_difference"] < 1e-5
    init = manifest["checkpoint"]["init"]
    assert init["source"].endswith("cache/alexnet/weights/alexnet-owt-7be5be79.pth")
    assert (len(init["loaded"]), init["made_anew"]) == (16, [])
    rows = CliRunner().invoke(main, ["predict", "photo.jpg", "--format", "jsonl", "--device", "cpu"])
    (row,) = map(msgspec.json.decode, rows.stdout.splitlines())

    network = make_model(config.model, num_classes=1000, crop_px=CROP_PX).eval()
    network.load_state_dict(weights)
    with Image.open(image) as opened, torch.inference_mode():
        inputs = AlexNet_Weights.IMAGENET1K_V1.transforms(crop_size=CROP_PX, resize_size=72)(opened)[None]
        expected = torch.softmax(network(inputs), dim=1)[0]
    names = AlexNet_Weights.IMAGENET1K_V1.meta["categories"]
    for found in row["predictions"]:
        assert found["probability"] == pytest.approx(expected[found["class_id"]].item(), rel=1e-3)
        assert found["label"] == names[found["class_id"]]
    assert row["predictions"][0]["class_id"] == expected.argmax().item()
    assert expected.max() > 0.02, "the network is sure of nothing: equal rows would say little"


def test_torchvisions_options_are_checked_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        (["torchvision", "--precision", "int8"], "name ImageNet, which has labels, with --data"),
        (["torchvision", "--opset", "5"], "--opset 5: a number from"),
        (["torchvision", "--max-batch", "0"], "from 1 to 4096"),
        (["--mirror", "http://x"], "--mirror is for `alexnet export torchvision`"),
    ):
        refused = CliRunner().invoke(main, ["export", *arguments])
        assert (refused.exit_code, words in refused.stderr) == (2, True), refused.output
    assert list(tmp_path.iterdir()) == []


def test_photograph_windows_are_pieces_of_photographs() -> None:
    with photograph_windows() as dataset:
        assert (len(dataset), dataset.classes, dataset.root.name) == (
            64, (), "china.jpg and flower.jpg of scikit-learn",
        )  # fmt: skip
        with Image.open(dataset.path_at(0)) as window:
            pixels = np.asarray(window)
        assert len({dataset.read(index) for index in range(64)}) == 64
    assert np.array_equal(pixels, np.asarray(read_photographs()["china.jpg"])[:128, :128])
    assert not dataset.root.exists()
