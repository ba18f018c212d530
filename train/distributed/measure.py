"""The clock of a device that works beside this process, and the peak of its memory."""

from __future__ import annotations

import time

import torch

from data_pipeline.common.machine import resident_mb


def wait_for(device: torch.device) -> float:
    """Wait until the device has finished its work; return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory_mb(device: torch.device) -> float:
    """Return the peak of memory: on a GPU, what torch held there; on a CPU, what this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resident_mb(peak=True)
