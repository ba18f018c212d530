"""Keep the kernels that TensorRT-RTX compiled for a GPU, for the next process that runs the engine there.

TensorRT-RTX compiles an engine's kernels where it first runs; it has this cache in place of a timing cache.
The library itself compares a file with the GPU, the driver and its own version before it uses it.
`RuntimeCache` needs a GPU.

Source: TensorRT-RTX, `IRuntimeConfig.create_runtime_cache`, `IRuntimeCache.deserialize`.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from data_pipeline.common.files import user_cache, write_atomic

log = logging.getLogger("infer")


def cache_path(engine_sha256: str, version: str, architecture: str) -> Path | None:
    """The file for an engine, a library version and a GPU architecture; None for a user without a home."""
    name = f"{engine_sha256[:32]}-{version}-{architecture}.bin"
    try:
        return user_cache() / "tensorrt-rtx" / name
    except OSError as error:
        log.warning("what TensorRT-RTX compiles cannot be kept: %s", error)
        return None


class RuntimeCache:
    """The cache of one engine, and the execution context that uses it.

    Args:
        engine: a deserialised engine of `tensorrt_rtx`.
        path: where the cache is kept, read if it is there; None for a cache that is not kept.
    """

    def __init__(self, engine: Any, path: Path | None) -> None:
        self._path = path
        self._config = engine.create_runtime_config()
        self._cache = self._config.create_runtime_cache()
        self._stored = b"" if path is None else _read(path)
        if self._stored and not self._cache.deserialize(self._stored):
            log.info("%s is of another driver or damaged: TensorRT-RTX compiles the engine again", path)
            self._stored = b""
        if not self._config.set_runtime_cache(self._cache):
            log.warning("TensorRT-RTX takes no runtime cache: it compiles the engine in every process")
        self.context = engine.create_execution_context(self._config)

    def save(self) -> None:
        """Write the cache if anything was compiled since it was read."""
        blob = self._cache.serialize()
        content = b"" if blob is None else bytes(memoryview(blob))
        if self._path is None or not content or content == self._stored:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, content)
        except OSError as error:
            log.warning("what TensorRT-RTX compiled cannot be kept: %s", error)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        log.info("TensorRT-RTX compiles the engine for this GPU as it first runs, and keeps that in %s", path)
    except OSError as error:
        log.warning("what TensorRT-RTX compiled before cannot be read: %s", error)
    return b""
