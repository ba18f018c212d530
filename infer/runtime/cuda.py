"""The few calls of the CUDA driver that serving needs, through ctypes.

`libcuda` comes with every NVIDIA driver, so that owning GPU memory and a stream asks for no CUDA wheel, no
toolkit and no torch. Its streams and pointers are those of the CUDA runtime, which TensorRT uses.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_COMPUTE_CAPABILITY_MAJOR, _COMPUTE_CAPABILITY_MINOR = 75, 76
_NON_BLOCKING = 1


class CudaError(RuntimeError):
    """A call of the driver that failed, with its name and the driver's reason."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process may use; `architecture` is like `sm89`."""

    name: str
    architecture: str


@dataclass(frozen=True)
class GpuScan:
    """The GPUs of this machine, or the reason why there are none."""

    gpus: tuple[Gpu, ...]
    reason: str | None


class _Driver:
    """`libcuda`, loaded and initialised; a call that fails raises `CudaError`."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError:
            raise CudaError("no NVIDIA driver on this machine (libcuda.so.1 is not there)") from None
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        function: Callable[..., int] = getattr(self._library, name)
        if status := function(*arguments):
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            words = text.value.decode() if text.value else "unknown error"
            raise CudaError(f"{name}: {words} (CUDA error {status})")

    def integer(self, name: str, *arguments: Any) -> int:
        """Call a query, and return the number that it writes through its first argument."""
        value = ctypes.c_int()
        self.call(name, ctypes.byref(value), *arguments)
        return value.value


@cache
def _driver() -> _Driver:
    return _Driver()


def scan_gpus() -> GpuScan:
    """Look for GPUs. Never raises; honours CUDA_VISIBLE_DEVICES, as the driver does."""
    try:
        driver = _driver()
        gpus = tuple(_describe(driver, index) for index in range(driver.integer("cuDeviceGetCount")))
    except CudaError as error:
        return GpuScan((), str(error))
    return GpuScan(gpus, None if gpus else "the NVIDIA driver shows no GPU to this process")


def _describe(driver: _Driver, index: int) -> Gpu:
    device = driver.integer("cuDeviceGet", index)
    name = ctypes.create_string_buffer(256)
    driver.call("cuDeviceGetName", name, len(name), device)
    major = driver.integer("cuDeviceGetAttribute", _COMPUTE_CAPABILITY_MAJOR, device)
    minor = driver.integer("cuDeviceGetAttribute", _COMPUTE_CAPABILITY_MINOR, device)
    return Gpu(name.value.decode(errors="replace"), f"sm{major}{minor}")


class CudaSession:
    """The first GPU's primary context, one stream, and their memory; `close` frees all of it.

    Raises:
        CudaError: the driver refuses.
    """

    def __init__(self) -> None:
        self._driver = _driver()
        device = self._driver.integer("cuDeviceGet", 0)
        self._context, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        self._driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        # Calls that free what is held, the last first.
        self._frees: list[tuple[str, Any]] = [("cuDevicePrimaryCtxRelease_v2", device)]
        self.activate()
        self._driver.call("cuStreamCreate", ctypes.byref(self._stream), _NON_BLOCKING)
        self._frees.append(("cuStreamDestroy_v2", self._stream))

    @property
    def stream(self) -> int:
        """The stream's handle, as `execute_async_v3` takes it."""
        assert self._stream.value is not None
        return self._stream.value

    def activate(self) -> None:
        """Make this GPU the current one of the calling thread."""
        self._driver.call("cuCtxSetCurrent", self._context)

    def allocate(self, size_bytes: int) -> int:
        """Memory on the GPU, as a pointer."""
        pointer = ctypes.c_uint64()
        self._driver.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size_bytes))
        self._frees.append(("cuMemFree_v2", pointer))
        return pointer.value

    def pinned(self, shape: tuple[int, ...], dtype: type[np.generic]) -> NDArray[Any]:
        """An array in page-locked host memory, which the GPU copies from and to by itself."""
        size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pointer = ctypes.c_void_p()
        self._driver.call("cuMemHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(size_bytes), 0)
        assert pointer.value is not None
        self._frees.append(("cuMemFreeHost", pointer))
        memory = (ctypes.c_ubyte * size_bytes).from_address(pointer.value)
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def copy_in(self, target: int, source: NDArray[Any]) -> None:
        """Queue a copy of a contiguous host array to the GPU."""
        assert source.flags.c_contiguous
        size = ctypes.c_size_t(source.nbytes)
        address = ctypes.c_void_p(source.ctypes.data)
        self._driver.call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(target), address, size, self._stream)

    def copy_out(self, target: NDArray[Any], source: int) -> None:
        """Queue a copy from the GPU into a contiguous host array; valid after `synchronize`."""
        assert target.flags.c_contiguous
        size = ctypes.c_size_t(target.nbytes)
        address = ctypes.c_void_p(target.ctypes.data)
        self._driver.call("cuMemcpyDtoHAsync_v2", address, ctypes.c_uint64(source), size, self._stream)

    def synchronize(self) -> None:
        """Wait until all that was queued is done."""
        self._driver.call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Free the memory, the stream and the context; a second call does nothing."""
        if not self._context.value:
            return
        self.activate()
        while self._frees:
            self._driver.call(*self._frees.pop())
        self._context, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
