"""A Ray cluster: connects to one, or starts one on this machine for a single command; shares it out.

Nothing is sent to Ray's makers, no dashboard is served, and Ray's own lines go to its log files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import usable_cores
from infer.predict.options import PredictOptions

_STORE_BYTES = 80 << 20
"""A local object store, as small as Ray lets it be: only numbers of parts and counts pass through it."""
_MAX_THREADS = 4
"""Most cores of a worker where `--workers` does not say how many workers there shall be."""


class Share(NamedTuple):
    """The number of workers on a cluster, and the threads and GPUs of each."""

    workers: int
    threads: int
    gpus: int


@contextlib.contextmanager
def ray_cluster(options: PredictOptions) -> Iterator[Any]:
    """Ray, connected; at the end disconnected, and a cluster that was started for it is stopped.

    It changes the environment of this process for good: Ray reads it when it is imported, and hands it to the
    processes that it starts.

    Args:
        options: `address` of a cluster, as `ray.init` takes it; None starts one, with room for `workers`.
    Raises:
        UserError: Ray is not installed, or there is no cluster at the address.
    """
    if importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray needs Ray: pip install 'alexnet[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if options.address is None and "RAY_AUTH_MODE" not in os.environ:
        # By default Ray would write a token into the home folder; this one ends with the cluster.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if options.address is None:  # processes of a cluster whose command was killed wait a minute by default
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        import ray.data
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        local: dict[str, Any] = {
            "include_dashboard": False,
            "num_cpus": max(usable_cores(), options.workers or 1),
            "num_gpus": 0 if options.device == "cpu" else None,
            "object_store_memory": _STORE_BYTES,
            "_temp_dir": scratch,
        }
        kind = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            ray.init(address=options.address or "local", **kind, **({} if options.address else local))
        except (ConnectionError, ValueError, RuntimeError, OSError, TimeoutError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            what = f"no Ray cluster at --address {options.address}" if options.address else "Ray cannot start"
            raise UserError(f"{what}: {reason}") from error
        try:
            with contextlib.redirect_stdout(sys.stderr):  # Ray prints there that a worker died
                yield ray
        finally:
            ray.shutdown()


def share_cluster(machines: list[tuple[int, int]], options: PredictOptions) -> Share:
    """Share out a cluster: a GPU for each worker where there are any, unless `device` is `cpu`; else cores.

    Args:
        machines: cores and GPUs of each; no worker spans two.
        options: `workers` of the command; None for one on each GPU, or for as many of up to four cores as
            leave the fewest idle.
    Raises:
        UserError: a GPU was asked for and there is none, or more workers than there is room for.

    >>> share_cluster([(16, 0), (6, 0)], PredictOptions(paths=[]))
    Share(workers=11, threads=2, gpus=0)
    >>> share_cluster([(8, 0), (8, 0)], PredictOptions(paths=[], workers=3))
    Share(workers=3, threads=4, gpus=0)
    """
    cores, wanted = [cores for cores, _ in machines], options.workers
    num_gpus = sum(gpus for _, gpus in machines)
    if not num_gpus and (options.device == "cuda" or options.backend == "trt"):
        what = "--device cuda" if options.device == "cuda" else "--backend trt"
        raise UserError(f"{what} cannot be had: the Ray cluster has no GPU")
    if num_gpus and options.device != "cpu":
        if (wanted or 0) > num_gpus:
            raise UserError(f"--workers {wanted}: the Ray cluster has {num_gpus} GPUs")
        threads = min(cores // gpus for cores, gpus in machines if gpus)
        return Share(wanted or num_gpus, max(1, threads), 1)
    room = {threads: sum(c // threads for c in cores) for threads in range(1, max(cores) + 1)}
    if wanted is None:
        few = [threads for threads in room if threads <= _MAX_THREADS]
        threads = max(few, key=lambda threads: (threads * room[threads], threads), default=0)
    else:
        threads = max((threads for threads in room if room[threads] >= wanted), default=0)
    if not threads:
        raise UserError(f"--workers {wanted or 1}: the Ray cluster has {sum(cores)} CPUs")
    return Share(wanted or room[threads], threads, 0)
