"""The ranks of a run: the process group, the collectives, and each rank's device and share of the machine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from data_pipeline.common.errors import RankLostError, UserError
from train.config.schema import Device
from train.distributed.numerics import exact_float32, repeated_bits

log = logging.getLogger("train")

TIMEOUT_S = 600.0
"""Default of `timeout_s`: a collective that one rank does not join within this time ends the run."""

REPORT_S = 3.0
"""For so long ranks whose collective timed out report to each other; ranks that do not report are lost."""

POLL_S = 0.05
"""Between two looks at a flag for which a rank waits."""

REST_S = 0.1
"""So long gloo's threads get to free the tensors of the last collective before the interpreter ends."""

T = TypeVar("T")


@lru_cache(maxsize=1)
def _warn_once_that_the_store_is_gone() -> None:
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
        """Whether this rank writes files and logs: rank 0."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The device's name for people."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "the CPU"

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks, in place."""
        with self.named_collective("an all-reduce (sum)"):
            for tensor in tensors:
                dist.all_reduce(tensor)

    def max(self, *values: float) -> list[float]:
        """Return the maximum of each value over the ranks, on all of them. Waits for the device."""
        largest = torch.tensor(values, dtype=torch.float64, device=self.device)
        with self.named_collective("an all-reduce (maximum)"):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            return largest.tolist()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank, on all of them. Waits for the device."""
        return bool(self.max(float(flag))[0])

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all ranks, equal in shape: (world_size, ...), on every rank."""
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with self.named_collective("an all-gather"):
            dist.all_gather(gathered, tensor)
        return torch.stack(gathered)

    def own_share(self, ranks_R: Tensor) -> Tensor:
        """Return this rank's tensor of those that so many ranks gathered, which add up over the ranks.

        On another number of ranks than gathered them, rank 0 has their sum, and the others zeros.
        """
        if len(ranks_R) == self.world_size:
            return ranks_R[self.rank]
        total = ranks_R.sum(0)
        return total if self.is_main else torch.zeros_like(total)

    def set_flag(self, topic: str) -> None:
        """Set a flag that every rank can read without a collective; see `flag_is_set`."""
        try:
            PrefixStore("flags", dist.distributed_c10d._get_default_store()).set(topic, "")
        except dist.DistNetworkError:
            _warn_once_that_the_store_is_gone()

    def flag_is_set(self, topic: str) -> bool:
        """Return whether any rank has set the flag; False if the launcher, which holds the store, is gone."""
        try:
            return PrefixStore("flags", dist.distributed_c10d._get_default_store()).check([topic])
        except dist.DistNetworkError:
            _warn_once_that_the_store_is_gone()
            return False

    def barrier(self) -> None:
        """Wait until every rank is here."""
        with self.named_collective("a barrier"):
            dist.barrier()

    def broadcast_object(self, decide: Callable[[], T], slow_work: str = "") -> T:
        """Return what `decide` returns on rank 0, on every rank; if it raises, every rank raises the same.

        `slow_work` names work for which the others wait however long it takes; each has a name of its own."""
        answer: list[Any] = [None]
        if self.is_main:
            try:
                answer = [decide()]
            except Exception as error:  # the other ranks wait for an answer, whatever happens
                answer = [error]
            finally:
                if slow_work:
                    self.set_flag(slow_work)
        elif slow_work:
            self._wait_for_flag(slow_work)
        with self.named_collective("a broadcast of rank 0's decision"):
            dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], Exception):
            raise answer[0]
        decided: T = answer[0]
        return decided

    @contextmanager
    def first_of_machine(self, work: str) -> Iterator[None]:
        """Let one rank of each machine do some work first; the others wait, however long it takes.

        Args:
            work: what it is called, the same on every rank, each time another.
        """
        topic = f"{work} on the machine of rank {self.rank - self.local_rank}"
        try:
            if self.local_rank:
                self._wait_for_flag(topic)
            yield
        finally:
            if not self.local_rank:
                self.set_flag(topic)

    def wait_for_machines(self, work: str) -> None:
        """Wait, however long it takes, until `first_of_machine` did its work on every machine."""
        for leader in range(0, self.world_size, self.local_world_size):
            self._wait_for_flag(f"{work} on the machine of rank {leader}")

    def _wait_for_flag(self, topic: str) -> None:
        """Wait until any rank has set the flag, however long it takes: a collective would time out."""
        while not self.flag_is_set(topic):
            time.sleep(POLL_S)

    def gather_objects(self, value: T) -> list[T]:
        """Return every rank's value, in the order of the ranks, on all of them."""
        gathered: list[Any] = [None] * self.world_size
        with self.named_collective("a gathering of the ranks' values"):
            dist.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, tensors: Iterable[Tensor], what: str) -> None:
        """Replace each tensor by rank 0's, in place."""
        with self.named_collective(f"a broadcast of {what}"):
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    @contextmanager
    def named_collective(self, name: str) -> Iterator[None]:
        """Name the collective that fails, and the ranks that did not join it, in the error.

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
            # A dead rank closes its connections, so that the others notice at once and report together.
            lost = self._lost_ranks(REPORT_S if timed_out else REPORT_S / 5)
            who = f"rank {' and '.join(map(str, lost))} did not join it" if lost else "every rank reports so"
            raise RankLostError(
                f"rank {self.rank} {reason} in {name}: {who}. Start again with --resume auto, or let "
                "torchrun do so with --max-restarts"
            ) from error

    def _lost_ranks(self, patience_s: float) -> list[int]:
        """Return the ranks that do not report, within a short time, that they wait as this one does."""
        missing = [rank for rank in range(self.world_size) if rank != self.rank]
        with suppress(RuntimeError):  # the store is gone with the launcher: no rank can report
            store = PrefixStore("waiting", dist.distributed_c10d._get_default_store())
            store.set(str(self.rank), "")
            end = time.monotonic() + patience_s
            while missing and time.monotonic() < end:
                missing = [rank for rank in missing if not store.check([str(rank)])]
                time.sleep(0.1)
        return missing


def env_rank() -> int:
    """Return the rank that torchrun gave this process; 0 outside torchrun."""
    return int(os.environ.get("RANK", "0"))


def cpu_share(local_world_size: int) -> int:
    """Return the processor cores for each of so many ranks on this machine, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


def choose_device(wanted: Device) -> Literal["cpu", "cuda"]:
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
    """Check that each local rank gets a device of its own.

    Raises:
        UserError: more ranks on this machine than it has GPUs.
    """
    if device == "cuda" and local_world_size > num_gpus:
        raise UserError(
            f"{local_world_size} processes on this machine, but it has {num_gpus} GPU(s): "
            f"use --nproc {num_gpus} or fewer, or --set device=cpu"
        )


def _open_store(rank: int, world_size: int, timeout: timedelta) -> Store:
    """Open the store at which the ranks meet: torchrun's, or one in this process outside torchrun."""
    if "RANK" not in os.environ:
        return HashStore()
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    # torchrun's store outlives a restart of the ranks: the dead ranks' addresses are still in it.
    return PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def open_world(
    wanted: Device, timeout_s: float = TIMEOUT_S, *, deterministic: bool = False
) -> Iterator[World]:
    """Join the process group (NCCL on GPUs, gloo on CPUs), and leave it on every path.

    Outside torchrun this is a group of one, so that no other code has to distinguish the cases.

    Args:
        deterministic: see `train.distributed.numerics.repeated_bits`.
    Raises:
        UserError: the device is not available, or there are more local ranks than GPUs.
    """
    kind = choose_device(wanted)
    rank, world_size = env_rank(), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    check_rank_count(local_world_size, kind, torch.cuda.device_count())
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    with repeated_bits(deterministic), exact_float32():
        if kind == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            store=_open_store(rank, world_size, timedelta(seconds=timeout_s)),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if kind == "cuda" else None,
        )
        try:
            yield World(rank, world_size, local_rank, local_world_size, device)
        finally:
            dist.destroy_process_group()
            if kind == "cpu":
                # A thread that frees a tensor while the interpreter ends takes the process down with SIGABRT.
                time.sleep(REST_S)
