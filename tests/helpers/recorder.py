"""A CUDA graph's way of working, on the CPU: operations are recorded once and replayed on the same memory.

As in a graph, host numbers are those of the recording for ever, what is read and written lies where it lay
then, and no operation may hand a value to the host.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from train.graphs.capture import Work

TO_HOST = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique")
"""Operators that give Python a value, or a shape that depends on one."""
FROM_HOST = ("lift_fresh", "lift")
"""A tensor made of Python's numbers: on a GPU a copy that the host waits for."""
REPOSITORY = Path(__file__).parents[2]


class HostValueError(AssertionError):
    """Raised for a value that goes to or comes from the host, which a graph cannot hold."""


@dataclass
class Call:
    """One operation, with the memory of its tensors."""

    function: Any
    args: Any
    kwargs: Any
    result: Any

    def __post_init__(self) -> None:
        """Look at the results once, and not at every replay."""
        self.leaves = tree_leaves(self.result)
        self.places = [_memory(leaf) if isinstance(leaf, Tensor) else 0 for leaf in self.leaves]

    def host_arguments(self) -> tuple[str, tuple[str, ...]]:
        """The name, and all arguments; of tensors what a graph knows without their values."""
        leaves = tree_leaves((self.args, self.kwargs))
        return str(self.function), tuple(
            f"{leaf.dtype} {tuple(leaf.shape)} {leaf.stride()}" if isinstance(leaf, Tensor) else repr(leaf)
            for leaf in leaves
        )

    def replay(self) -> None:
        """Do it again; what a functional operation gives goes where its first result lies."""
        results = self.function(*self.args, **self.kwargs)
        results = [results] if isinstance(results, Tensor) else tree_leaves(results)
        for old, place, new in zip(self.leaves, self.places, results, strict=True):
            if isinstance(old, Tensor) and place != _memory(new):
                assert old.shape == new.shape and old.stride() == new.stride()
                old.copy_(new)


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations that run inside it, in their order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1].split(".")[0]
        if name in TO_HOST or name in FROM_HOST:
            raise HostValueError(f"{name} at {_our_line()}")
        own_args, own_kwargs = _as_they_are((args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in name and func.namespace != "profiler":
            self.calls.append(Call(func, own_args, own_kwargs, _as_they_are(result)))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Do all of it again."""
        for call in self.calls:
            call.replay()

    def host_arguments(self) -> list[tuple[str, tuple[str, ...]]]:
        """The arguments that are the same at every replay."""
        return [call.host_arguments() for call in self.calls]


class Recorder:
    """A `train.graphs.capture.Capture`: the first call of a work records it, all others replay."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []

    def __call__(self, work: Work) -> Work:
        """Return the work."""
        recording: Recording | None = None

        def run() -> None:
            nonlocal recording
            if recording is not None:
                recording.replay()
                return
            recording = Recording()
            self.recordings.append(recording)
            with recording:
                work()

        return run


def run_every_time(work: Work) -> Work:
    """A `train.graphs.capture.Capture` that captures nothing."""
    return work


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _as_they_are(values: Any) -> Any:
    """The same memory in tensors of their own, whose shapes no later operation changes."""
    return tree_map_only(Tensor, Tensor.detach, values)


def _our_line() -> str:
    """The innermost line of the trainer that is running."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(REPOSITORY / "train")]
    last = frames[-1] if frames else traceback.extract_stack()[0]
    return f"{Path(last.filename).name}:{last.lineno}: {last.line}"
