"""Decoded images in memory that several processes share, and what happens when one of them is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.common.errors import WorkerError
from data_pipeline.loading.pixel_store import PixelStore, StoreAddress

N, H, W = 300, 6, 5


def expected_pixels() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    pixels = np.random.default_rng(0).integers(1, 256, (N, H, W, 3), np.uint8)
    pixels[7] = 0
    return pixels


def own(pipe: Connection) -> None:
    """The owner: says where the store is, fills it, and ends as it is told."""
    store = PixelStore.create(N, H, W)
    pipe.send(store.address)
    how = pipe.recv()
    store.pixels[:], store.valid[:] = expected_pixels(), True
    if how == "complete":
        store.pixels[7] = 1
        store.pixels[7], store.valid[7], store.reasons[7] = 0, False, "truncated JPEG: µ"
        store.complete()
    elif how == "fail":
        store.fail("train/3.jpg is gone")
    elif how == "close":
        store.close()
    pipe.send("done")
    pipe.recv()


@contextmanager
def owner() -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection, StoreAddress]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=own, args=(theirs,))
    process.start()
    try:
        yield process, ours, ours.recv()
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()
        theirs.close()


@pytest.mark.slow
def test_two_processes_share_a_store() -> None:
    with owner() as (process, pipe, address):
        store = PixelStore.attach(address)
        assert not store.pixels.any() and not store.valid.any()
        pipe.send("complete")
        store.wait_complete()
        assert np.array_equal(store.pixels, expected_pixels())
        assert np.flatnonzero(~store.valid).tolist() == [7]
        assert store.reasons == {7: "truncated JPEG: µ"}
        with pytest.raises(ValueError, match="read-only"):
            store.pixels[0] = 1
        process.kill()
        process.join()
        assert np.array_equal(store.pixels, expected_pixels())
        store.wait_complete()
        store.close()
        with pytest.raises(WorkerError, match=f"process {address.pid}, .* has ended"):
            PixelStore.attach(address)


@pytest.mark.slow
def test_owner_killed_while_it_decodes_is_an_error() -> None:
    with owner() as (process, _, address):
        store = PixelStore.attach(address)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)  # and not reaped: its number is still taken
        started = time.monotonic()
        with pytest.raises(WorkerError, match=f"process {address.pid}, .* it was killed"):
            store.wait_complete()
        assert time.monotonic() - started < 1
        store.close()


@pytest.mark.slow
def test_owner_that_fails_says_why() -> None:
    with owner() as (_, pipe, address):
        store = PixelStore.attach(address)
        pipe.send("fail")
        with pytest.raises(WorkerError, match=r"^train/3\.jpg is gone$"):
            store.wait_complete()
        store.close()


@pytest.mark.slow
def test_store_that_was_closed_cannot_be_attached() -> None:
    with owner() as (_, pipe, address):
        pipe.send("close")
        assert pipe.recv() == "done"
        with pytest.raises(WorkerError, match="has ended"):
            PixelStore.attach(address)


@pytest.mark.parametrize("now", ["pipe", "file", "store"])
def test_address_of_another_file_is_refused(now: str, tmp_path: Path) -> None:
    """The number that a store's descriptor had may be another file's."""
    store = PixelStore.create(N, H, W)
    address, other = store.address, PixelStore.create(N, H, W)
    store.close()
    (tmp_path / "short").write_bytes(b"12")
    reader, writer = os.pipe()
    file = os.open(tmp_path / "short", os.O_RDONLY)
    number = {"pipe": reader, "file": file, "store": other.address.descriptor}[now]
    with pytest.raises(WorkerError, match="has ended"):
        PixelStore.attach(address._replace(descriptor=number))
    for descriptor in (reader, writer, file):
        os.close(descriptor)
    other.close()


def test_store_does_not_need_dev_shm() -> None:
    """A container has 64 MB there. This is larger than what is free; only what is written takes memory."""
    mount = os.statvfs("/dev/shm")
    size = mount.f_bavail * mount.f_frsize + (1 << 26)
    store = PixelStore.create(size // (64 * 64 * 3) + 1, 64, 64)
    assert store.pixels.nbytes > size
    store.pixels[[0, -1]] = 9
    store.valid[-1] = True
    store.complete()
    other = PixelStore.attach(store.address)
    assert (other.pixels[-1] == 9).all() and other.valid[-1] and not other.pixels[1].any()
    assert os.fstat(store.address.descriptor).st_blocks * 512 < 1 << 20
    assert str(Path(f"/proc/self/fd/{store.address.descriptor}").readlink()) == "/memfd:pixels (deleted)"
    store.close()
    other.close()


def test_closed_store_leaves_no_descriptor_and_spares_views() -> None:
    open_files = len(list(Path("/proc/self/fd").iterdir()))
    store = PixelStore.create(N, H, W)
    store.pixels[:] = 5
    view = store.pixels[3:5]
    store.close()
    store.close()
    assert (view == 5).all() and len(store.pixels) == 0
    del view, store
    assert len(list(Path("/proc/self/fd").iterdir())) == open_files
