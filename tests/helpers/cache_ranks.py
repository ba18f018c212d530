"""Two ranks that share decoded pixels: torchrun … -m tests.helpers.cache_ranks DATA, or … killed OPTIONS.

With DATA, a folder whose images have one size, rank 0 prints one JSON object of all ranks' results, which
`tests.train.test_data` checks. With OPTIONS it is `train.main`, where the process that decodes is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset
from data_pipeline.decode.pillow import decode_checked
from data_pipeline.loading.cache import DecodedCache
from data_pipeline.loading.scan import with_table
from tests.helpers.processes import shared_pixels_of
from train.config.load import make_config
from train.data import open_caches, place_on_device
from train.distributed.world import World, open_world
from train.main import main as train_main

RAM = make_config("demo", ["data.cache=ram"])
DELAY_S = 0.5


def times_of_first(world: World) -> tuple[float, float]:
    """When this rank enters and leaves the work that one of them does first."""
    with world.first_of_machine("the work"):
        entered = time.monotonic()
        time.sleep(0 if world.local_rank else DELAY_S)
        return entered, time.monotonic()


def failing_first(world: World) -> str:
    """How this rank ends where the first one fails."""
    try:
        with world.first_of_machine("work that fails"):
            if world.local_rank == 0:
                raise ArithmeticError("nobody foresaw this")
            return "entered"
    except ArithmeticError:
        return "failed"


def refusal(world: World, datasets: tuple[Dataset, ...], full_rank: int) -> str:
    """The error of `open_caches` on this rank where one rank's machine has no memory."""
    free = 1 if world.rank == full_rank else 1 << 40
    with ExitStack() as stack, mock.patch("train.data.bytes_available", lambda: free):
        try:
            return str(open_caches(RAM, world, datasets, 90, stack))
        except UserError as error:
            return str(error)


def opened(world: World, datasets: tuple[Dataset, ...], place: str) -> dict[str, Any]:
    """Count the images that this rank decodes, gets, and maps during its life and afterwards.

    Args:
        place: "gpu" is played by this machine's memory; one rank is slow to copy to it.
    """

    def slow(cache: DecodedCache, device: torch.device) -> DecodedCache:
        time.sleep(DELAY_S * world.rank)
        return place_on_device(cache, device)

    def digest(cache: DecodedCache) -> str:
        pixels = cache.pixels if place == "ram" else cache.pixels.numpy()
        return hashlib.sha256(pixels).hexdigest()

    decode = mock.Mock(side_effect=decode_checked)
    with (
        mock.patch("train.data.choose_cache", lambda *_, **__: place),
        mock.patch("train.data.place_on_device", slow),
        mock.patch("data_pipeline.loading.cache.decode_checked", decode),
        ExitStack() as stack,
    ):
        caches = open_caches(RAM, world, datasets, 90, stack)
        found = {
            "decoded": decode.call_count,
            "pixels": [digest(cache) for cache in caches],
            "failed": [sorted(cache.reasons) for cache in caches],
            "mapped": len(shared_pixels_of("self")),
        }
    del caches
    return {**found, "mapped afterwards": len(shared_pixels_of("self"))}


def main() -> None:
    """Do all of it, and let rank 0 print."""
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    datasets = tuple(with_table(open_dataset(root, split), 1) for split in ("train", "val"))
    with open_world("cpu") as world:
        # as if each rank were on a machine of its own
        alone = replace(world, local_rank=0, local_world_size=1)
        found: dict[str, Any] = {
            "times": times_of_first(world),
            "failing": failing_first(world),
            "refused": refusal(world, datasets, full_rank=0),
            "refused elsewhere": refusal(alone, datasets, full_rank=1),
            **{place: opened(world, datasets, place) for place in ("none", "ram", "gpu")},
        }
        gathered = world.gather_objects(found)
        if world.is_main:
            click.echo(json.dumps(gathered))


def die(data: bytes, max_pixels: int) -> None:
    """In place of decoding."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] != "killed":
        main()
    else:
        with mock.patch("data_pipeline.loading.cache.decode_checked", die):
            train_main(sys.argv[2:])
