"""The functions of torch's ONNX exporter, parsed once a process and not for each export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any


@contextmanager
def parse_torchlib_once() -> Iterator[None]:
    """Let torch's exporter keep onnxscript's 497 functions: to parse them takes 0.4 s of an export's 1.7.

    Nothing is imported until the first export.
    """
    lazy: Any = import_module("torch.onnx._internal._lazy_import").onnxscript_apis
    lazy.get_torchlib_ops = cache(lambda: lazy.__getattr__("get_torchlib_ops")())
    yield
    del lazy.get_torchlib_ops
