"""Processes that read: a killed one is one line, and none is left."""

from __future__ import annotations

import os
import signal
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.common.errors import WorkerError
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loading.readers import ReaderPool


def test_killed_reader_process_is_one_error_line(dataset: Dataset) -> None:
    with closing(ReaderPool([dataset], 1)) as readers:
        readers.fetch(dataset, np.arange(3), 10**8)  # until it answers, it may not yet show its name
        (child,) = reader_processes()
        os.kill(child, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"was killed, for lack of memory perhaps: set data\.readers"):
            readers.fetch(dataset, np.arange(3), 10**8)
    assert not reader_processes()


def reader_processes() -> list[int]:
    """Process ids of this process's children that read."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            ours = f"PPid:\t{os.getpid()}\n" in (folder / "status").read_text()
            if ours and "data_pipeline.loading.readers" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
    return found
