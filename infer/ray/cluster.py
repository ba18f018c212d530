"""A Ray cluster for one command: one of its own on this machine, or one that is there; left as it was found.

Nothing is sent to Ray's makers, no dashboard is served, and Ray's own lines go to its log files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common.errors import UserError, WorkerError
from data_pipeline.common.machine import usable_cores

log = logging.getLogger("infer")

LOCAL = "local"
MAX_SCRATCH = 40
"""Characters of the scratch folder's path: Ray's sockets lie below it, and their paths have 107 at most."""

_STORE_BYTES = 80 << 20  # the least that Ray takes: only numbers of parts and counts pass through it
_MAX_THREADS = 4
_END_S = 20.0


class Share(NamedTuple):
    """How a cluster is shared out: how many workers, and what each of them holds."""

    workers: int
    threads: int
    gpus: int


def share_cores(cores: list[int], workers: int | None) -> Share:
    """Share out the cores of some machines, none of which can lend to another.

    Args:
        cores: of each machine.
        workers: how many are wanted; None for workers of up to four cores, that leave the fewest idle.
    Raises:
        UserError: more workers than cores.

    >>> share_cores([2], None), share_cores([16, 6], None)
    (Share(workers=1, threads=2, gpus=0), Share(workers=11, threads=2, gpus=0))
    >>> share_cores([2], 2), share_cores([8, 8], 3)
    (Share(workers=2, threads=1, gpus=0), Share(workers=3, threads=4, gpus=0))
    """
    fits = {threads: sum(c // threads for c in cores) for threads in range(1, max(cores, default=0) + 1)}
    if workers is None:
        few = {threads: count for threads, count in fits.items() if threads <= _MAX_THREADS}
        if not few:
            raise UserError("the Ray cluster has no CPU to work on")
        threads = max(few, key=lambda t: (t * few[t], t))
        return Share(few[threads], threads, 0)
    enough = [threads for threads, count in fits.items() if count >= workers]
    if not enough:
        raise UserError(f"--workers {workers}: the Ray cluster has {sum(cores)} CPUs")
    return Share(workers, max(enough), 0)


def share_gpus(machines: list[tuple[int, int]], workers: int | None) -> Share:
    """A GPU for each worker, and the cores beside it.

    Args:
        machines: cores and GPUs of each machine.
        workers: how many are wanted; None for one on each GPU.
    Raises:
        UserError: more workers than GPUs.

    >>> share_gpus([(16, 2), (8, 0)], None)
    Share(workers=2, threads=8, gpus=1)
    """
    count = sum(gpus for _, gpus in machines)
    if workers is not None and workers > count:
        raise UserError(f"--workers {workers}: the Ray cluster has {count} GPUs")
    threads = min(cores // gpus for cores, gpus in machines if gpus)
    return Share(workers or count, max(1, threads), 1)


@contextlib.contextmanager
def ray_cluster(address: str, *, workers: int | None, no_gpus: bool) -> Iterator[Any]:
    """Ray, connected; disconnected afterwards, and what was started for it has ended.

    Args:
        address: `local` for a cluster on this machine, for this command alone; else as `ray.init` takes it.
        workers: how many workers a local cluster must have room for.
        no_gpus: whether a local cluster leaves the GPUs alone.
    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """
    environment = dict(os.environ)
    terminate = signal.getsignal(signal.SIGTERM)
    local = address == LOCAL
    scratch = _scratch() if local else None
    try:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        if local and "RAY_AUTH_MODE" not in os.environ:
            # Ray's default writes a token into the home folder; this one ends with the cluster.
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        ray = _import_ray()
        try:
            own = {
                "include_dashboard": False,
                "num_cpus": max(usable_cores(), workers or 1),
                "num_gpus": 0 if no_gpus else None,
                "object_store_memory": _STORE_BYTES,
                "_temp_dir": scratch,
            }
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(own if local else {}),
            )
        except (ConnectionError, ValueError, RuntimeError, OSError, TimeoutError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            what = "Ray cannot be started" if local else f"no Ray cluster at --address {address}"
            raise UserError(f"{what}: {reason}") from error
        try:
            with contextlib.redirect_stdout(sys.stderr):  # Ray prints there that a worker died
                yield ray
        finally:
            started = _descendants(os.getpid()) if local else set()
            ray.shutdown()
            _wait_for_the_end(started)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        os.environ.clear()
        os.environ.update(environment)
        with contextlib.suppress(ValueError):  # not the main thread's business
            signal.signal(signal.SIGTERM, terminate)


def machines_of(ray: Any) -> list[tuple[int, int]]:
    """Cores and GPUs of each living machine of the cluster."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in resources]


def _import_ray() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
            import ray.data
    except ModuleNotFoundError as error:
        raise UserError("--engine ray needs Ray: pip install 'alexnet[ray]'") from error
    return ray


def _scratch() -> str:
    """A folder of its own for Ray's sockets and logs, below the system's place for such (TMPDIR)."""
    base = tempfile.gettempdir()
    if len(base) + len("/ray-12345678") > MAX_SCRATCH:
        raise UserError(f"Ray's sockets need a shorter path than {base}: set TMPDIR to another folder")
    return tempfile.mkdtemp(prefix="ray-", dir=base)


def _descendants(root: int) -> set[int]:
    """Processes that this one started, and theirs."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (state := _state(int(entry.name))) is not None:
            parents[int(entry.name)] = state[1]
    found, new = set[int](), {root}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found


def _state(pid: int) -> tuple[str, int] | None:
    """A process's state and its parent; None where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return None
    return fields[0], int(fields[1])


def _wait_for_the_end(pids: set[int]) -> None:
    """Ray ends its workers after `shutdown` returns; one that does not end is killed."""

    def alive() -> list[int]:
        return [pid for pid in pids if (state := _state(pid)) is not None and state[0] not in "ZX"]

    deadline = time.monotonic() + _END_S
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in alive():
        log.warning("process %d of the Ray cluster did not end and is killed", pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def failed_worker(error: BaseException) -> WorkerError:
    """What Ray raised, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return WorkerError(f"a Ray worker failed: {type(error).__name__}: {last}")
