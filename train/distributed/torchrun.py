"""torchrun: `alexnet train` runs it on this machine, and a rank identifies the one that started it."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.common.errors import InterruptedRunError, UserError
from data_pipeline.common.start import own_script
from train.config.schema import RunConfig
from train.distributed.world import check_rank_count, choose_device, cpu_share

log = logging.getLogger("train")

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that torchrun passes on to the ranks: its own list, and Slurm's before a job's time is up."""


@dataclass(frozen=True)
class Launch:
    """Identifies the torchrun that started this process. A restart of the ranks is the same launch.

    Attributes:
        run_id: torchrun's `--rdzv-id`; a new one each time with `--standalone`, `none` without either.
        launcher: the torchrun process on this machine.
        restarts: how often this launch has restarted its ranks.
    """

    run_id: str
    launcher: str
    restarts: int


def env_launch() -> Launch | None:
    """Return this process's launch; None outside torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    parent = os.getppid()
    # Process ids are reused; together with the time at which the process began they are unique.
    began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return Launch(
        run_id=os.environ["TORCHELASTIC_RUN_ID"],
        launcher=f"{socket.gethostname()}:{parent}:{began}",
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def rendezvous_options(num_nodes: str, endpoint: str | None, run_id: str | None) -> list[str]:
    """Build torchrun's options for the place where the torchruns of all machines meet.

    Args:
        num_nodes: number of machines: `2`, or `1:4` where they may come and go.
        endpoint: `HOST[:PORT]` of one of them, which hosts the store; None for a single machine.
        run_id: name of this launch, the same on all machines; None for a single machine.
    Raises:
        UserError: options with which the machines could not meet.
    """
    if not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", num_nodes):
        raise UserError(f"--nnodes takes a number of machines, or MIN:MAX, not {num_nodes!r}")
    least, _, most = num_nodes.partition(":")
    if most and int(most) < int(least):
        raise UserError(f"--nnodes {num_nodes}: the largest number is below the smallest")
    if endpoint is None and run_id is None and num_nodes == "1":
        # Both, since torchrun fills in missing options from variables that a cluster may have set (PET_…).
        return ["--standalone", "--nnodes=1"]
    if endpoint is None or not run_id or run_id == "none":
        raise UserError(
            "several machines meet at --rdzv-endpoint HOST:PORT, under a name of this launch, --rdzv-id; "
            "give both, and the same on every machine"
        )
    return [
        f"--nnodes={num_nodes}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={run_id}",
    ]  # fmt: skip


def choose_rank_count(wanted: str, config: RunConfig) -> int:
    """Return how many ranks to start on this machine.

    Args:
        wanted: a number, or `auto`: one for each GPU, and one where there is none.
        config: whose `device` decides whether GPUs are used.
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


def run_torchrun(
    num_ranks: int, arguments: Sequence[str], max_restarts: int, rendezvous: Sequence[str]
) -> int:
    """Run `train.main` under torchrun on this machine.

    Args:
        num_ranks: processes to start here.
        arguments: of `train.main`.
        max_restarts: how often all ranks are restarted after one of them fails.
        rendezvous: from `rendezvous_options`.
    Returns:
        0, or the exit code of the rank that failed first; a rank has logged why by then.
    """
    # Imported here: ranks import this module for `env_launch`, and need none of torchrun.
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # torchrun would choose 1 and warn about it.
    os.environ.setdefault("OMP_NUM_THREADS", str(cpu_share(num_ranks)))
    options = [
        *rendezvous, f"--nproc_per_node={num_ranks}", f"--max-restarts={max_restarts}",
        f"--signals-to-handle={SIGNALS}", *own_script("train.main:main"), *arguments,
    ]  # fmt: skip
    # torchrun's own log repeats the rank's error, around a traceback of torchrun itself.
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
    overrides: Sequence[str], allow_changed_schedule: bool, debug: bool, **named: object
) -> list[str]:
    """Format the options of `train.cli` as a command line.

    Args:
        named: the options with a value; None for one that is not given.
    """
    arguments = [f"--{name}={value}" for name, value in named.items() if value is not None]
    arguments += [f"--set={override}" for override in overrides]
    return arguments + ["--allow-changed-schedule"] * allow_changed_schedule + ["--debug"] * debug
