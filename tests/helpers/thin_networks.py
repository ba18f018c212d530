"""The published networks with an eighth of their channels, for tests that are not about the networks.

A step of a few small images is mostly the weights' own work: 2.4 million of them, here 40 thousand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import cast
from unittest import mock

from train.models.alexnet import NETWORKS

THINNER = 8
_PUBLISHED = dict(NETWORKS)
_THIN = {
    name: replace(
        network,
        channels=cast(tuple[int, int, int, int, int], tuple(c // THINNER for c in network.channels)),
    )
    for name, network in _PUBLISHED.items()
}


@contextmanager
def thin_networks() -> Iterator[None]:
    """Build thin networks until the end of the context; warm ranks that are started in it do so as well."""
    with mock.patch.dict(NETWORKS, _THIN):
        yield


@contextmanager
def networks_with(*channels: int) -> Iterator[None]:
    """Build every network with these channels of its five convolutions until the end of the context."""
    five = cast(tuple[int, int, int, int, int], channels)
    with mock.patch.dict(NETWORKS, {name: replace(net, channels=five) for name, net in _PUBLISHED.items()}):
        yield


@contextmanager
def published_networks() -> Iterator[None]:
    """Build the networks as published until the end of the context."""
    with mock.patch.dict(NETWORKS, _PUBLISHED):
        yield


def are_thin() -> bool:
    """Whether this process builds thin networks."""
    return NETWORKS["paper"] is _THIN["paper"]


def stay_thin() -> None:
    """Build thin networks in the rest of this process's life."""
    NETWORKS.update(_THIN)
