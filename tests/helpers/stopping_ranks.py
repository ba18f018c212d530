"""Ranks whose run is stopped and resumed after every step: tests.helpers.stopping_ranks OPTIONS...

OPTIONS are overrides of the demo recipe. Two runs are made in `whole/` and `stopped/`: one undisturbed, and
one in which a rank, in turn, sends itself SIGUSR1: in the middle of the first step after each start, or,
where a start evaluates first, in that evaluation. Rank 0 prints as JSON at which steps it stopped.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from torch import Tensor

from data_pipeline.common.errors import InterruptedRunError
from data_pipeline.loading.batches import Batch
from train.config.load import make_config
from train.config.schema import RunConfig
from train.distributed.world import env_rank
from train.health.metrics import AccuracyMeter
from train.main import train
from train.models.alexnet import AlexNet
from train.step import StepParts, train_step


class Sender:
    """Sends this process the signal in the second training pass of a start, or in its first evaluation."""

    def __init__(self) -> None:
        self.armed = False
        self.passes = 0
        whole = AlexNet.forward

        def forward(network: AlexNet, images: Tensor) -> Tensor:
            self.passes += 1
            if self.armed and (self.passes == 2 or not network.training):
                self.armed = False
                os.kill(os.getpid(), signal.SIGUSR1)
            return whole(network, images)

        AlexNet.forward = forward  # type: ignore[assignment, method-assign]


@contextmanager
def stream_written(name: str) -> Iterator[None]:
    """Record which samples of this rank go into each step: `NAME-RANK.json`."""
    stream: list[tuple[int, list[int]]] = []

    def noted(parts: StepParts, batches: Sequence[Batch], rate: float, step: int) -> AccuracyMeter:
        stream.append((step, [int(index) for batch in batches for index in batch.indices]))
        return train_step(parts, batches, rate, step)

    with mock.patch("train.setup.train_step", noted):
        yield
    Path(f"{name}-{env_rank()}.json").write_text(json.dumps(stream))


def main(overrides: list[str]) -> None:
    """Make both runs."""
    config = make_config("demo", overrides)
    with stream_written("whole"):
        train(config, Path("whole"), "none")
    with stream_written("stopped"):
        stops = make_stopped(config)
    if env_rank() == 0:
        print(json.dumps(stops))  # noqa: T201


def make_stopped(config: RunConfig) -> list[int]:
    """Stop and resume until the run is finished. Returns the steps that it was stopped after."""
    sender, stops, start = Sender(), [], 0
    while True:
        start += 1
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(start)  # a new place to meet
        sender.passes, sender.armed = 0, start % 2 == env_rank()
        try:
            train(config, Path("stopped"), "auto")
        except InterruptedRunError as error:
            stops.append(int(str(error).split(" at step ")[1].split(",")[0]))
        else:
            return stops


if __name__ == "__main__":
    main(sys.argv[1:])
