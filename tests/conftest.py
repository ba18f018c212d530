"""What every test gets: `gpu` tests skip with their reason, and a test that leaks state fails."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from data_pipeline.common.console import LOGGERS

if TYPE_CHECKING:
    from infer.bundle.load import Bundle


@lru_cache(maxsize=1)
def _why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs an NVIDIA GPU that torch can use; there is none here"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip `gpu` tests where there is no GPU."""
    if item.get_closest_marker("gpu") and (reason := _why_no_gpu()):
        pytest.skip(reason)


def _environment() -> dict[str, str]:
    # pytest names the running test there; torch its own cache folder, and Inductor a function, on first use.
    passing = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR")
    return {k: v for k, v in os.environ.items() if k not in passing}


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves environment variables, threads or a process group behind."""
    environment = _environment()
    threads = set(threading.enumerate())
    for name in LOGGERS:  # a command sends them to stderr alone; pytest's own capture needs them as they were
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    yield
    import torch.distributed as dist

    left = [t.name for t in threading.enumerate() if t not in threads and not t.daemon]
    assert not left, f"threads left behind: {left}"
    assert not dist.is_initialized(), "a process group was left behind"
    assert _environment() == environment


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo digits, written once for all tests."""
    from data_pipeline.datasets.demo import write_demo

    root = tmp_path_factory.mktemp("data") / "digits"
    write_demo(root)
    return root


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the checkpoint, data and exports of `infer_samples`, made once for all tests."""
    from tests.helpers.infer_samples import exported

    folder = tmp_path_factory.getbasetemp()
    exported(folder)  # outside of any test: torch's exporter sets environment variables
    return folder


@pytest.fixture(scope="session")
def bundle(base: Path) -> Bundle:
    """A gated export of both formats, with its checkpoint's run around it."""
    from tests.helpers.infer_samples import exported

    return exported(base)


@pytest.fixture(scope="session")
def files(base: Path) -> list[Path]:
    """Ten images, one of each class."""
    from tests.helpers.infer_samples import data_folder, images_in

    return images_in(data_folder(base) / "val")[::5]
