"""The ranks of a run. The only module that reads torchrun's environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data_pipeline.errors import UserError

TIMEOUT = timedelta(minutes=10)
"""A collective that one rank does not join within this time ends the run."""


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

    def sum(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks, in place."""
        for tensor in tensors:
            dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; the same answer on all. Waits for the device."""
        flags = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags.item())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier()

    def average_buffers(self, model: nn.Module) -> None:
        """Make running statistics (BatchNorm's) the same on every rank: their mean over the ranks."""
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= self.world_size


def env_rank() -> int:
    """The rank that torchrun gave this process; 0 outside torchrun."""
    return int(os.environ.get("RANK", "0"))


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


@contextmanager
def open_world(wanted: Literal["auto", "cpu", "cuda"]) -> Iterator[World]:
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
        store=None if "RANK" in os.environ else torch._C._distributed_c10d.HashStore(),
        rank=rank,
        world_size=world_size,
        timeout=TIMEOUT,
        device_id=device if kind == "cuda" else None,
    )
    try:
        with exact_float32():
            yield World(rank, world_size, local_rank, local_world_size, device)
    finally:
        dist.destroy_process_group()
