"""Limits torch's kernels: exact float32, and with `deterministic` those that repeat their bits."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

log = logging.getLogger("train")

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""The environment variable by which cuBLAS sizes its workspaces, which decide how it adds."""
WORKSPACES = (":4096:8", ":16:8")
"""Its values with which sums are the same each time. Source: cuBLAS, Results Reproducibility."""


@contextmanager
def exact_float32() -> Iterator[None]:
    """Turn off TensorFloat-32, cuDNN's default with a 10-bit mantissa, and restore it at the end."""
    # Each setting by itself: the one for all does not overrule a library that has set one of them.
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
def repeated_bits(wanted: bool) -> Iterator[None]:
    """Take only kernels that repeat their bits, or else let cuDNN time its own; restored at the end.

    An operation that has no such kernel on the device raises RuntimeError. It must be entered before anything
    has been computed on a GPU: cuBLAS reads its variable of the environment once.

    Args:
        wanted: whether bits must repeat; if not, cuDNN takes the algorithm that is fastest when it tries.
    Source: torch.use_deterministic_algorithms.
    """
    cudnn: Any = torch.backends.cudnn
    filled: Any = torch.utils.deterministic  # whose attributes are those of a class in its place
    before = cudnn.benchmark, cudnn.deterministic, filled.fill_uninitialized_memory
    was_on = torch.are_deterministic_algorithms_enabled()
    warned_only = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get(WORKSPACE)
    cudnn.benchmark = not wanted
    if wanted:
        if workspace not in WORKSPACES:
            if workspace is not None:
                log.warning(
                    f"{WORKSPACE} is {workspace}, with which cuBLAS does not repeat its bits: "
                    f"{WORKSPACES[0]} is used (deterministic=true)"
                )
            os.environ[WORKSPACE] = WORKSPACES[0]
        cudnn.deterministic = True
        # a fill of each new tensor; nothing here reads what was not written
        filled.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=warned_only)
        cudnn.benchmark, cudnn.deterministic, filled.fill_uninitialized_memory = before
        os.environ.pop(WORKSPACE, None)
        if workspace is not None:
            os.environ[WORKSPACE] = workspace
