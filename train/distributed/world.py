"""The ranks of a run. The only module that reads torchrun's environment."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from data_pipeline.common.errors import RankLostError, UserError

log = logging.getLogger("train")

TIMEOUT_S = 600.0
"""A collective that one rank does not join within this time ends the run, unless the configuration says."""

REPORT_S = 3.0
"""For so long ranks that timed out hear from each other who did; the others are the lost ones."""

REST_S = 0.1
"""For so long gloo's threads may free what they hold of the last collective, before Python ends."""

T = TypeVar("T")


@lru_cache(maxsize=1)
def _say_that_the_store_is_gone() -> None:
    log.warning("the launcher is gone: the ranks hear of a signal to one of them only between steps")


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and the device it computes on."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks: rank 0."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """What a person calls the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "the CPU"

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks, in place."""
        with self.named_collective("the sum of counts"):
            for tensor in tensors:
                dist.all_reduce(tensor)

    def max(self, *values: float) -> list[float]:
        """The largest of each value over the ranks; the same answer on all. Waits for the device."""
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.named_collective("the question whether to stop"):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            answer: list[float] = largest.tolist()
        return answer

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on all. Waits for the device."""
        return bool(self.max(float(flag))[0])

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, of one shape on all: (world_size, ...), on every rank."""
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with self.named_collective("the gathering of counts"):
            dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def set_flag(self, topic: str) -> None:
        """Let every rank know, without a collective, that something has come up; see `flag_is_set`."""
        try:
            PrefixStore("told", dist.distributed_c10d._get_default_store()).set(topic, "")
        except dist.DistNetworkError:
            _say_that_the_store_is_gone()

    def flag_is_set(self, topic: str) -> bool:
        """Whether any rank has told so by now; False without the launcher, which holds what they tell."""
        try:
            return PrefixStore("told", dist.distributed_c10d._get_default_store()).check([topic])
        except dist.DistNetworkError:
            _say_that_the_store_is_gone()
            return False

    def barrier(self) -> None:
        """Wait until every rank is here."""
        with self.named_collective("a barrier"):
            dist.barrier()

    def broadcast_object(self, decide: Callable[[], T]) -> T:
        """What rank 0 decides, on every rank; if it raises an exception, every rank raises it."""
        answer: list[Any] = [None]
        if self.is_main:
            try:
                answer = [decide()]
            except Exception as error:
                answer = [error]
        with self.named_collective("the decision of rank 0"):
            dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], Exception):
            raise answer[0]
        decided: T = answer[0]
        return decided

    def average_buffers(self, model: nn.Module) -> None:
        """Make running statistics (BatchNorm's) the same on every rank: their mean over the ranks."""
        with self.named_collective("the mean of running statistics"):
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.world_size

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by rank 0's, in place."""
        with self.named_collective("the running statistics of rank 0"):
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    @contextmanager
    def named_collective(self, name: str) -> Iterator[None]:
        """Give the failure of a collective its name, and that of the rank which did not join it.

        gloo raises where a rank is gone, or after the time-out. NCCL's own watchdog ends the process instead.

        Raises:
            RankLostError: in place of gloo's error.
        """
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and "gloo" not in str(error):
                raise
            timed_out = "imed out" in str(error)
            reason = "timed out" if timed_out else "lost a connection"
            lost = self._lost_ranks(REPORT_S if timed_out else REPORT_S / 5)  # a dead rank is known at once
            who = f"rank {' and '.join(map(str, lost))} did not join it" if lost else "every rank reports so"
            raise RankLostError(
                f"rank {self.rank} {reason} in {name}: {who}. Start again with --resume auto, or let "
                "torchrun do so with --max-restarts"
            ) from error

    def _lost_ranks(self, patience_s: float) -> list[int]:
        """The ranks that do not say, within a short time, that they wait as this one does."""
        missing = [rank for rank in range(self.world_size) if rank != self.rank]
        try:
            store = PrefixStore("waiting", dist.distributed_c10d._get_default_store())
            store.set(str(self.rank), "")
            end = time.monotonic() + patience_s
            while missing and time.monotonic() < end:
                missing = [rank for rank in missing if not store.check([str(rank)])]
                time.sleep(0.1)
        except RuntimeError:  # the store is gone with the launcher: nobody can be heard
            pass
        return missing


def env_rank() -> int:
    """The rank that torchrun gave this process; 0 outside torchrun."""
    return int(os.environ.get("RANK", "0"))


@dataclass(frozen=True)
class Launch:
    """Which torchrun started this process. A restart of the ranks is the same launch.

    Args:
        run_id: torchrun's `--rdzv-id`; made up anew each time with `--standalone`, `none` without either.
        launcher: the torchrun process on this machine.
        restarts: how often this launch has started its ranks again.
    """

    run_id: str
    launcher: str
    restarts: int


def env_launch() -> Launch | None:
    """This process's launch; None outside torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    parent = os.getppid()
    # A process id comes back one day; with the time at which the process began, it does not.
    began = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return Launch(
        run_id=os.environ["TORCHELASTIC_RUN_ID"],
        launcher=f"{socket.gethostname()}:{parent}:{began}",
        restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
    )


def cpu_share(local_world_size: int) -> int:
    """Processor cores that one of so many ranks on this machine can call its own, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    """Resolve `auto`: CUDA where there is a GPU.

    Raises:
        UserError: CUDA asked for and not available.
    """
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch sees no GPU here; use --set device=cpu")
    return wanted


def check_rank_count(local_world_size: int, device: Literal["cpu", "cuda"], num_gpus: int) -> None:
    """One device per local rank.

    Raises:
        UserError: more ranks on this machine than it has GPUs.
    """
    if device == "cuda" and local_world_size > num_gpus:
        raise UserError(
            f"{local_world_size} processes on this machine, but it has {num_gpus} GPU(s): "
            f"use --nproc {num_gpus} or fewer, or --set device=cpu"
        )


@contextmanager
def exact_float32() -> Iterator[None]:
    """float32 means float32: no TensorFloat-32, which keeps 10 bits of the mantissa, and is cuDNN's way."""
    # Each by itself: a library that has set one of them would not be overruled by the setting for all.
    settings: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def _open_store(rank: int, world_size: int, timeout: timedelta) -> Store:
    """Where the ranks find each other: torchrun's store, or one of our own where there is a single rank."""
    if "RANK" not in os.environ:
        return HashStore()
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    # torchrun keeps its store through a restart of the ranks: the dead ones' addresses are still in it.
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def open_world(wanted: Literal["auto", "cpu", "cuda"], timeout_s: float = TIMEOUT_S) -> Iterator[World]:
    """Join the process group (NCCL on GPUs, gloo on CPUs), and leave it on every path.

    Outside torchrun this is a group of one, so that nothing else has to tell the cases apart.

    Raises:
        UserError: the device is not to be had, or there are more local ranks than GPUs.
    """
    kind = choose_device(wanted)
    rank, world_size = env_rank(), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    check_rank_count(local_world_size, kind, torch.cuda.device_count())
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=_open_store(rank, world_size, timedelta(seconds=timeout_s)),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if kind == "cuda" else None,
    )
    try:
        with exact_float32():
            yield World(rank, world_size, local_rank, local_world_size, device)
    finally:
        dist.destroy_process_group()
        if kind == "cpu":
            # A thread that frees a tensor while the interpreter ends takes the process down with SIGABRT.
            time.sleep(REST_S)
