"""Fixtures and rules of all tests: `gpu` and `network` tests skip with a reason, and leaked state fails."""

from __future__ import annotations

import fcntl
import gc
import importlib.util
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from data_pipeline.common.console import LOGGERS

if TYPE_CHECKING:
    from infer.bundle.load import Bundle


collect_ignore_glob = ["helpers/*"]  # no tests, and some need packages that not every machine has

DEV_PACKAGES = {"hypothesis", "pyarrow", "ray", "tritonclient", "yaml"}
"""Packages of the extra `dev`, by the names under which test files import them."""

MISSING = re.compile(r"^E +ModuleNotFoundError: No module named '([^']+)'", re.MULTILINE)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Know `timeout` of `pyproject.toml` where pytest-timeout, of the extra `dev`, is not installed."""
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds of a test; pytest-timeout, which is not installed, would end it")


def pytest_configure(config: pytest.Config) -> None:
    """Know the marker `timeout` there, too; let each of several workers compute with one thread.

    With more threads than cores torch's wait for each other by spinning: everything took twice as long.
    """
    if hasattr(config, "workerinput"):
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout: seconds; nothing ends the test without pytest-timeout")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Look for no garbage in what is imported, a million objects that stay: a third of the time it takes."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a file that needs a package of the extra `dev` where that is not installed.

    An error would end the run before its first test, those of other files included.
    """
    report = yield
    missing = MISSING.search(str(report.longrepr)) if report.failed else None
    if missing and missing[1].partition(".")[0] in DEV_PACKAGES:
        reason = f"Skipped: needs {missing[1]}: pip install 'alexnet[dev]'"
        report.outcome, report.longrepr = "skipped", (str(report.fspath), 1, reason)
    return report


@pytest.hookimpl(trylast=True)  # of the tests that `-m` leaves
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run files with slow tests first where there are workers: they then end at about the same time.

    Before all comes a file that needs the shared export, and late the others that do: while one worker makes
    it, the rest need not wait.
    """
    if not hasattr(config, "workerinput"):
        return  # one process keeps the order of the command line
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    waiting = dict.fromkeys(item.path for item in items if "base" in getattr(item, "fixturenames", ()))
    first = next(iter(waiting), None)
    items.sort(key=lambda item: (item.path != first, item.path not in slow, item.path in waiting))


@lru_cache(maxsize=1)
def _why_no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "needs an NVIDIA GPU that torch can use; there is none here"


@lru_cache(maxsize=1)
def _why_no_network() -> str | None:
    """Ask pip for a small package: whatever index and proxy it is configured with."""
    from tests.helpers.environments import run_pip

    with tempfile.TemporaryDirectory() as folder:
        done = run_pip(
            "download", "--no-deps", "--retries=0", "--timeout=5", f"--dest={folder}", "setuptools"
        )
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if line] or ["it says nothing"]
    return f"needs a package index, and pip reaches none: {errors[-1]}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip `gpu` tests where there is no GPU, and `network` tests where there is no network."""
    for marker, why_not in (("gpu", _why_no_gpu), ("network", _why_no_network)):
        if item.get_closest_marker(marker) and (reason := why_not()):
            pytest.skip(reason)


def _environment() -> dict[str, str]:
    # pytest names the running test there; torch its own cache folder, and Inductor a function, on first use;
    # scikit-learn sets those of OpenMP when it is imported.
    passing = {
        "PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
        "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK",
    }  # fmt: skip
    return {k: v for k, v in os.environ.items() if k not in passing}


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves environment variables, threads or a process group behind.

    A test that trains may set torch's number of threads; the next one has that of before. Beside other
    workers two threads on two cores wait for each other by spinning, nine times as long as one computes.
    """
    import torch

    num_threads = torch.get_num_threads()
    environment = _environment()
    threads = set(threading.enumerate())
    for name in LOGGERS:  # a command sends them to stderr alone; pytest's own capture needs them as they were
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    yield
    torch.set_num_threads(num_threads)
    left = [t.name for t in threading.enumerate() if t not in threads and not t.daemon]
    assert not left, f"threads left behind: {left}"
    assert not torch.distributed.is_initialized(), "a process group was left behind"
    assert _environment() == environment


@pytest.fixture
def no_compile_threads() -> Iterator[None]:
    """Inductor keeps a pool of threads for the next compilation, which is not a leak but looks like one."""
    import torch._inductor.config

    with torch._inductor.config.patch(compile_threads=1):
        yield


@pytest.fixture(scope="module")
def thin() -> Iterator[None]:
    """Build networks with an eighth of their channels, here and in warm ranks; not in `gpu` tests."""
    from tests.helpers.thin_networks import thin_networks

    with thin_networks():
        yield


@pytest.fixture(autouse=True)
def networks_of_gpu_tests(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give `gpu` tests the published networks: which kernels run there depends on their channels."""
    if not ("thin" in request.fixturenames and request.node.get_closest_marker("gpu")):
        yield
        return
    from tests.helpers.thin_networks import published_networks

    with published_networks():
        yield


@pytest.fixture(scope="session", autouse=True)
def torchlib_once() -> Iterator[None]:
    """Let torch's exporter make its tables once."""
    from tests.helpers.torchlib import make_torchlib_once

    with make_torchlib_once():
        yield


def _make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Make folders once a run: of several workers one makes them, and the others have copies.

    Args:
        name: of what is made.
        make: makes them in a folder.
    Returns:
        The folder that has them, the session's own.
    """
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" not in os.environ:
        make(folder)
        return folder
    made = folder.parent / "made"  # workers' folders lie side by side
    with (folder.parent / "made.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
        if name not in lock.read().split():
            made.mkdir(exist_ok=True)
            make(made)
            lock.write(f"{name}\n")
        for one in made.iterdir():
            if not (folder / one.name).exists():  # others are in use
                shutil.copytree(one, folder / one.name)
    return folder


@pytest.fixture(scope="module")
def warm_cases() -> Iterator[None]:
    """Fork the cases of benchmarks from a process that has torch imported."""
    from tests.helpers.warm_python import warm_bench_cases

    with warm_bench_cases():
        yield


@pytest.fixture(scope="session")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo digits, written once for all tests."""
    from data_pipeline.datasets.demo import write_demo

    folder = _make_once(tmp_path_factory, "demo", lambda folder: write_demo(folder / "demo/digits"))
    return folder / "demo/digits"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, demo_data: Path) -> Path:
    """The folder of the checkpoint, data and exports of `infer_samples`, made once; workers have copies.

    What builds the checkpoint's network needs the fixture `thin` of tests/infer.
    """
    from tests.helpers.infer_samples import data_folder, exported

    def make(folder: Path) -> None:  # outside of any test: torch's exporter sets environment variables
        data_folder(folder, demo_data)
        exported(folder)

    return _make_once(tmp_path_factory, "exported", make)


@pytest.fixture(scope="session")
def bundle(base: Path) -> Bundle:
    """A gated export of both formats, with its checkpoint's run around it."""
    from tests.helpers.infer_samples import exported

    return exported(base)


@pytest.fixture(scope="session")
def featured(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Bundle:
    """A gated export that gives the features of fc7."""
    from tests.helpers.infer_samples import exported_with_features

    return exported_with_features(_make_once(tmp_path_factory, "featured", exported_with_features))


@pytest.fixture(scope="session")
def files(base: Path) -> list[Path]:
    """Ten images, one of each class."""
    from tests.helpers.infer_samples import data_folder, images_in

    return images_in(data_folder(base) / "val")[::5]
