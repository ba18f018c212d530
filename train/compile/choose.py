"""Decides where Inductor's kernels replace torch's: in LRN, and in the whole network."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from data_pipeline.common.errors import SaveError, raising
from data_pipeline.common.files import write_json
from train.distributed.hybrid import Parallel
from train.distributed.measure import wait_for
from train.distributed.world import World
from train.models.alexnet import AlexNet
from train.models.batch_norm import BatchNorm
from train.models.dropout import masks_of
from train.models.lrn import LocalResponseNorm
from train.optim.precision import Precision

log = logging.getLogger("train")

WORTH_ELEMENTS = {"cpu": 5e9, "cuda": 2.5e11}
"""Elements that LRN normalises in a whole run, from which on compiling takes less time than it saves: 25 s,
against 11 ns an element on two CPU cores. On a GPU the saving is an estimate, 0.1 ns."""
COMPILED = "compiled.json"
"""File in the run folder: whether the network is compiled, so that a resumed run computes the same bits."""
ROUNDS = 3
"""Passes that are timed; the fastest counts."""


def prepare_lrn(
    network: AlexNet,
    wanted: Literal["auto", "fused", "eager"],
    *,
    crop_px: int,
    num_images: int,
    precision: Precision,
    world: World,
) -> None:
    """Compile a network's LRN if that is configured, or pays in the run; rank 0 logs the choice.

    The choice depends on the run alone, not on where it is resumed. Every rank must call this.

    Args:
        wanted: `auto` compiles in runs long enough.
        num_images: how many images the whole run trains on.
    """
    if wanted == "eager" or not lrn_layers(network):
        return
    enough = WORTH_ELEMENTS[world.device.type]
    if wanted == "fused" or num_images * count_elements(network, crop_px) >= enough:
        fuse_lrn(network, crop_px, precision, world)
    elif world.is_main:
        log.info("LRN is not compiled: this run is too short to gain by it (lrn=fused does it anyway)")


def fuse_lrn(network: AlexNet, crop_px: int, precision: Precision, world: World) -> None:
    """Compile the LRN of a network, forward and backward; if that fails on any rank, no rank uses it.

    The first rank of a machine compiles first, and the others find its kernels in the cache on disk.
    """
    layers = lrn_layers(network)
    if not layers:
        return
    drop_toolkit_note()
    started = time.monotonic()
    if world.is_main:
        log.info("compiling LRN, once for this machine: it can take half a minute")
    with world.first_of_machine("LRN is compiled"):
        failure = _try_lrn(network, crop_px, precision)
    failed = world.any(bool(failure))
    for layer in layers:
        layer.fused = not failed
    if failed:
        _warn_of_failure("LRN runs without a compiler, several times slower", failure, world)
    elif world.is_main:
        log.info(f"LRN compiled in {time.monotonic() - started:.0f} s; the kernels are kept for the next run")


def _warn_of_failure(outcome: str, failure: str, world: World) -> None:
    """Log on each rank where compiling failed why it did; on rank 0 in any case."""
    if failure or world.is_main:
        log.warning(f"{outcome}: {failure or 'compiling failed on another rank'}")


def drop_toolkit_note() -> None:
    """Keep a warning of torch off stderr: that a CUDA toolkit is installed where there is no GPU.

    Inductor looks for one even when it compiles for a CPU, on every rank.
    """
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_no_toolkit_note)


def _is_no_toolkit_note(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No CUDA runtime is found")


def lrn_layers(network: nn.Module) -> list[LocalResponseNorm]:
    """Return the LRN layers of a network."""
    return [module for module in network.modules() if isinstance(module, LocalResponseNorm)]


def count_elements(network: AlexNet, crop_px: int) -> int:
    """Count the elements that the LRN of a network normalises for one image."""
    counted, maps_NCHW = 0, _zeros(network, 1, crop_px)
    with torch.no_grad():
        for layer in network.features:
            if isinstance(layer, LocalResponseNorm):
                counted += maps_NCHW.numel()
            maps_NCHW = layer(maps_NCHW)
    return counted


def compile_step(network: AlexNet) -> None:
    """Compile the forward and backward pass of a network as a whole, in place, at its next call.

    LRN stays a call of its own: inlined into the pooling behind it, it would be computed 9 times. So do norms
    that wait for other ranks.
    """
    drop_toolkit_note()
    for layer in _calls_of_their_own(network):
        layer.forward = torch.compiler.disable(layer.forward)  # type: ignore[no-untyped-call]
    # Inductor's front end reads `.grad` of LRN's output, and torch warns of that.
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
    network.compile(dynamic=False)


def undo_compile_step(network: AlexNet) -> None:
    """Let a network run as it did before `compile_step`."""
    network._compiled_call_impl = None
    for layer in _calls_of_their_own(network):
        vars(layer).pop("forward", None)


def maybe_compile(
    parallel: Parallel,
    batch: int,
    crop_px: int,
    precision: Precision,
    world: World,
    run: Path | None,
    *,
    timed: bool = True,
) -> bool:
    """Compile the network's passes if that makes them faster here: both forms are timed, on zeros.

    Rank 0 decides for all ranks and writes the choice to the run folder, where a resumed run finds it. Every
    rank must call this.

    Args:
        batch: images that pass through at once.
        run: the run's folder, on rank 0.
        timed: whether they must be faster compiled; if not, they are compiled wherever that is possible.
    Returns:
        Whether they are compiled now.
    """
    assert isinstance(parallel, DistributedDataParallel), "a configuration of both is refused"
    known = world.broadcast_object(lambda: _read_choice(run))
    if known is not None:
        if known:
            compile_step(parallel.module)
        if world.is_main:
            log.info(f"the network is {'' if known else 'not '}compiled, as it was when the run began")
        return known
    images = _zeros(parallel.module, batch, crop_px)
    with _unchanged(parallel):
        # as in a step: what is compiled for other tensors would be compiled again there
        masks_of(parallel).start_outside_of_steps(batch, images.device)
        eager_s = _time_passes(parallel, images, precision) if timed else float("inf")
        started, failure, compiled_s = time.monotonic(), "", float("inf")
        try:
            compile_step(parallel.module)
            _time_passes(parallel, images, precision, rounds=1)
            compile_s = time.monotonic() - started
            compiled_s = _time_passes(parallel, images, precision) if timed else 0.0
        except Exception as error:
            failure = first_line(error)
    failed = world.any(bool(failure))
    faster = world.broadcast_object(lambda: not failed and compiled_s < eager_s)
    if not faster:
        undo_compile_step(parallel.module)
    if failed:
        _warn_of_failure("the network is not compiled", failure, world)
    elif world.is_main and not timed:
        log.info(f"the network is compiled ({compile_s:.0f} s), and not timed: deterministic=true")
    elif world.is_main:
        log.info(
            f"forward and backward: {compiled_s:.3f} s compiled ({compile_s:.0f} s to compile), "
            f"{eager_s:.3f} s as it is: the network is {'' if faster else 'not '}compiled"
        )
    if run is not None:
        with raising(SaveError, f"{run / COMPILED} could not be written"):
            write_json(run / COMPILED, faster)
    return faster


def _calls_of_their_own(network: nn.Module) -> list[nn.Module]:
    norms = [m for m in network.modules() if isinstance(m, BatchNorm) and m.ranks is not None]
    return [*lrn_layers(network), *norms]


def _try_lrn(network: AlexNet, crop_px: int, precision: Precision) -> str:
    """Compile LRN for every batch size above one. Returns the error, or an empty text."""
    for layer in lrn_layers(network):
        layer.fused = True
    weights = list(network.features.parameters())
    try:
        with precision.autocast():
            out = network.features(_zeros(network, 2, crop_px))
        torch.autograd.grad(out.float().sum(), weights)
    except Exception as error:  # a compiler can fail in any way; training does not depend on it
        return first_line(error)
    return ""


def _read_choice(run: Path | None) -> bool | None:
    path = run / COMPILED if run is not None else None
    return msgspec.json.decode(path.read_bytes(), type=bool) if path is not None and path.is_file() else None


def _zeros(network: nn.Module, batch: int, crop_px: int) -> Tensor:
    device = next(network.parameters()).device
    return torch.zeros(batch, crop_px, crop_px, 3, device=device).permute(0, 3, 1, 2)


def _time_passes(
    parallel: DistributedDataParallel, images: Tensor, precision: Precision, rounds: int = ROUNDS
) -> float:
    """Return the seconds of the fastest forward and backward pass."""
    best = float("inf")
    for _ in range(rounds):
        started = time.perf_counter()
        with precision.autocast():
            loss = parallel(images).float().square().mean()
        torch.autograd.backward(loss)
        best = min(best, wait_for(images.device) - started)
    return best


@contextmanager
def _unchanged(parallel: DistributedDataParallel) -> Iterator[None]:
    """Restore running statistics, gradients and the rows of the dropout masks at the end."""
    buffers = [buffer.clone() for buffer in parallel.buffers()]
    yield
    masks_of(parallel).rows_N = None
    for buffer, old in zip(parallel.buffers(), buffers, strict=True):
        buffer.copy_(old)
    for parameter in parallel.parameters():
        parameter.grad = None


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()[:200]}" if lines else type(error).__name__
