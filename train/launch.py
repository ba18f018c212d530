"""`alexnet train`: start torchrun on this machine, and answer with the ranks' exit code."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from data_pipeline.errors import InterruptedRunError, UserError
from train.config import RunConfig
from train.distributed import check_rank_count, choose_device, cpu_share

log = logging.getLogger("train")

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What torchrun passes on to the ranks: its own list, and Slurm's signal before the time is up."""


def choose_rank_count(wanted: str, config: RunConfig) -> int:
    """How many ranks to start here.

    Args:
        wanted: a number, or `auto`: one for each GPU, and one where there is none.
        config: says whether GPUs are to be used.
    Raises:
        UserError: not a number above 0, or more ranks than GPUs.
    """
    device = choose_device(config.device)
    num_gpus = torch.cuda.device_count()
    if wanted == "auto":
        return num_gpus if device == "cuda" else 1
    if not wanted.isdecimal() or int(wanted) == 0:
        raise UserError(f"--nproc takes a number above 0, or auto, not {wanted!r}")
    check_rank_count(int(wanted), device, num_gpus)
    return int(wanted)


def launch(num_ranks: int, arguments: Sequence[str], max_restarts: int = 0) -> int:
    """Run `train.main` under torchrun on this machine.

    Args:
        num_ranks: processes to start.
        arguments: of `train.main`.
        max_restarts: how often all ranks are started again after one of them fails.
    Returns:
        0, or the exit code of the rank that failed first; a rank has said why by then.
    """
    # torchrun would choose 1 and warn about it.
    os.environ.setdefault("OMP_NUM_THREADS", str(cpu_share(num_ranks)))
    options = [
        "--standalone", f"--nproc_per_node={num_ranks}", f"--max-restarts={max_restarts}",
        f"--signals-to-handle={SIGNALS}", "-m", "train.main", *arguments,
    ]  # fmt: skip
    # Its own log repeats what the rank said, around a traceback of torchrun itself.
    for name in ("torch.distributed.elastic", "torch.distributed.elastic.multiprocessing.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        torchrun.run(torchrun.parse_args(options))  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            log.error(f"rank {rank} was ended by {name}")
            return 1
        return int(failure.exitcode)
    except SignalException as error:
        log.info(f"stopped by {error.sigval.name}; what the ranks saved is where --resume auto goes on")
        return InterruptedRunError.exit_code
    return 0


def training_arguments(
    recipe: str, data: Path | None, out: Path, resume: str, overrides: Sequence[str], debug: bool
) -> list[str]:
    """The options of `train.options`, as a command line."""
    arguments = [f"--recipe={recipe}", f"--out={out}", f"--resume={resume}"]
    arguments += [f"--data={data}"] if data is not None else []
    arguments += [f"--set={override}" for override in overrides]
    return arguments + (["--debug"] if debug else [])
