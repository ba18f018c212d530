"""Compiled TensorRT-RTX kernels: named by engine, version and GPU, kept in the user's cache."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from infer.bundle.load import Bundle
from infer.runtime.choose import probe_machine, why_no_engine
from infer.runtime.rtx_cache import cache_path


def test_rtx_cache_path_differs_by_engine_version_and_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = {
        cache_path(sha256 * 64, version, gpu)
        for sha256 in "ab"
        for version in ("1.7", "1.8")
        for gpu in ("sm89", "sm120")
    }
    assert len(paths) == 8
    assert all(path is not None and path.is_relative_to(tmp_path) for path in paths)
    assert caplog.messages == []


def test_rtx_cache_calls_match_tensorrts_signatures() -> None:
    """Without a GPU no engine runs; the bindings at least say that these are the calls."""
    trt = pytest.importorskip("tensorrt_rtx")
    for owner, name, *parts in (
        (trt.ICudaEngine, "create_runtime_config", "-> tensorrt_rtx.IRuntimeConfig"),
        (trt.IRuntimeConfig, "create_runtime_cache", "-> nvinfer1::IRuntimeCache"),
        (trt.IRuntimeConfig, "set_runtime_cache", "cache: nvinfer1::IRuntimeCache", "-> bool"),
        (trt.IRuntimeCache, "deserialize", "blob: typing_extensions.Buffer", "-> bool"),
        (trt.IRuntimeCache, "serialize", "-> tensorrt_rtx.IHostMemory"),
        (trt.ICudaEngine, "create_execution_context", "runtime_config: tensorrt_rtx.IRuntimeConfig"),
    ):
        told = getattr(owner, name).__doc__.replace("tensorrt_rtx_bindings.", "")
        assert all(part in told for part in parts), told


@pytest.mark.gpu
def test_rtx_cache_of_one_process_serves_the_next(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = bundle.manifest.engine
    assert engine is not None
    if engine.library != "tensorrt_rtx":
        pytest.skip(f"the engine is of {engine.library}, which compiles while it builds")
    if reason := why_no_engine(bundle, probe_machine()):
        pytest.skip(reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = (
        "import json, logging, sys, time, numpy as np\n"
        "from pathlib import Path\n"
        "from infer.bundle.load import load_bundle\n"
        "from infer.runtime.tensorrt import TensorRTBackend\n"
        "logging.basicConfig(level=logging.INFO, format='%(message)s')\n"
        "started = time.monotonic()\n"
        "backend = TensorRTBackend(load_bundle(Path(sys.argv[1])))\n"
        "backend.run(np.zeros((1, 56, 56, 3), np.uint8))\n"
        "backend.close()\n"
        "print(json.dumps(time.monotonic() - started))"
    )
    first, second = (
        subprocess.run(
            [sys.executable, "-c", code, str(bundle.folder)], capture_output=True, text=True, check=True
        )
        for _ in range(2)
    )
    assert "compiles the engine for this GPU" in first.stderr
    assert "compiles the engine" not in second.stderr
    assert len(list((tmp_path).rglob("*.bin"))) == 1
    logging.getLogger().info("%s s, then %s s", json.loads(first.stdout), json.loads(second.stdout))
