"""Weights of torchvision's names in a small network on small crops, served in the published ones' place."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor

import train.pretrained.published
import train.pretrained.readers
from tests.helpers.http_server import Server
from train.config.schema import RunConfig
from train.models.alexnet import make_model
from train.pretrained.published import PublishedFile

CROP_PX = 64


def publish_small(
    server: Server, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> tuple[RunConfig, dict[str, Tensor]]:
    """Serve such a file, and make it the one that is known.

    Args:
        cache: a folder for the user's cache.
    Returns:
        The network's configuration, and its weights.
    """
    whole = train.pretrained.readers.TORCHVISION
    config = msgspec.structs.replace(
        whole,
        model=msgspec.structs.replace(whole.model, hidden_units=8, init="he"),
        preprocessing=msgspec.structs.replace(whole.preprocessing, resize_px=72, crop_px=CROP_PX),
    )
    torch.manual_seed(0)
    weights = make_model(config.model, num_classes=1000, crop_px=CROP_PX).state_dict()
    weights["classifier.6.weight"] *= 4  # predictions that are sure of something
    for name, tensor in weights.items():
        if name.endswith("bias"):
            tensor.normal_(std=0.1)  # the exporter drops biases that are all zero
    stream = io.BytesIO()
    torch.save(weights, stream)
    server.content = stream.getvalue()
    url = f"http://127.0.0.1:{server.server_port}/models/alexnet-owt-7be5be79.pth"
    sha256 = hashlib.sha256(server.content).hexdigest()
    monkeypatch.setattr(
        train.pretrained.published, "TORCHVISION_FILE", PublishedFile(url, sha256, len(server.content))
    )
    monkeypatch.setattr(train.pretrained.readers, "TORCHVISION", config)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return config, weights
