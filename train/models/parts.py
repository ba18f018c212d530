"""The parts of an AlexNet that fine-tuning treats apart: features that are kept, and the last layer."""

from __future__ import annotations

from typing import Literal

from torch import nn

from train.models.alexnet import AlexNet


def head_of(network: AlexNet) -> tuple[str, nn.Module]:
    """Return the layer that gives the logits, and its name in the network."""
    children = list(network.classifier.named_children())
    name, layer = next((n, m) for n, m in reversed(children) if any(p.ndim == 2 for p in m.parameters()))
    return f"classifier.{name}", layer


def set_training(network: AlexNet, freeze: Literal["none", "features"]) -> None:
    """Put a network into training mode, its frozen part into evaluation mode.

    So batch norms that are frozen use the running statistics that they came with, and do not change them.
    """
    network.train()
    if freeze == "features":
        network.features.eval()
