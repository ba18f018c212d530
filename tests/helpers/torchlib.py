"""The tables of torch's ONNX exporter, made once a process and not for each export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, wraps
from importlib import import_module
from typing import Any
from unittest import mock

import torch


@contextmanager
def make_torchlib_once() -> Iterator[None]:
    """Let torch's exporter keep the functions that it translates operators with, and those it decomposes.

    To make both anew is a third of the export of a small network. They are the same each time, since exports
    here register no functions of their own. Their modules take a second to import: the first export does it.
    """
    real = torch.onnx.export
    with ExitStack() as patches:
        start = cache(lambda: _keep_tables(patches))

        @wraps(real)
        def export(*args: Any, **options: Any) -> Any:
            start()
            return real(*args, **options)

        patches.enter_context(mock.patch("torch.onnx.export", export))
        yield


def _keep_tables(patches: ExitStack) -> None:
    registry: Any = import_module("torch.onnx._internal.exporter._registration").ONNXRegistry
    decomposition: Any = import_module("torch.onnx._internal.exporter._decomp")
    table_of = cache(decomposition.create_onnx_friendly_decomposition_table)

    def friendly_table(implemented: set[Any]) -> dict[Any, Any]:
        return dict(table_of(frozenset(implemented)))

    patches.enter_context(
        mock.patch.object(decomposition, "create_onnx_friendly_decomposition_table", friendly_table)
    )
    once = staticmethod(cache(registry.from_torchlib))
    patches.enter_context(mock.patch.object(registry, "from_torchlib", once))
