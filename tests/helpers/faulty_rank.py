"""`train.main` with one rank that fails on purpose: torchrun … -m tests.helpers.faulty_rank FAULTS OPTIONS...

FAULTS is JSON, a list of {"kind", "rank", "forward", "restart", "after"}: in training
pass `forward` (0-based, counted from the start of the process), in the torchrun attempt `restart` (default:
any), once there is a file that matches `after` (default: at once), the rank
  nan       has a loss that is not a number
  inf       has an infinite loss with finite gradients
  gradient  has a finite loss with a gradient that is not a number
  spike     has a gradient that is 1000 times as large
  kill      is killed by SIGKILL
  hang      sleeps for ever, and joins no collective
  error     raises an unexpected exception
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.main import main
from train.models.alexnet import AlexNet


def install(faults: list[dict[str, Any]]) -> None:
    """Make the network of this process fail at the given passes."""
    rank, restart = int(os.environ.get("RANK", "0")), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    mine = [f for f in faults if f.get("rank", rank) == rank and f.get("restart", restart) == restart]
    whole, number = AlexNet.forward, -1

    def forward(network: AlexNet, images: Tensor) -> Tensor:
        nonlocal number
        logits_NC = whole(network, images)
        if not network.training:
            return logits_NC
        number += 1
        for fault in mine:
            if fault["forward"] == number:
                while "after" in fault and not list(Path().glob(fault["after"])):
                    time.sleep(0.05)
                logits_NC = fail(fault["kind"], logits_NC)
        return logits_NC

    AlexNet.forward = forward  # type: ignore[assignment, method-assign]


def fail(kind: str, logits_NC: Tensor) -> Tensor:
    """Do one of the things above."""
    if kind == "nan":
        return logits_NC * float("nan")
    if kind == "inf":
        return logits_NC * 0 + torch.linspace(-3e38, 3e38, logits_NC.shape[1], device=logits_NC.device)
    if kind in ("gradient", "spike"):
        factor = 1000.0 if kind == "spike" else float("nan")
        logits_NC.register_hook(lambda gradient: gradient * factor)  # type: ignore[no-untyped-call]
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # or torchrun would wait 30 s for it
        time.sleep(3600)
    elif kind == "error":
        raise ArithmeticError("nobody foresaw this")
    return logits_NC


if __name__ == "__main__":
    install(json.loads(sys.argv[1]))
    main(sys.argv[2:])
