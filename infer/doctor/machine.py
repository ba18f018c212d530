"""`alexnet doctor`: report this machine's libraries and GPUs, and what training and prediction would use."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from types import ModuleType
from typing import Any

from data_pipeline.common.machine import installed_version, usable_cores
from infer.runtime.choose import Machine, engine_libraries, probe_machine, tensorrt_versions, why_no_library

NOT_INSTALLED = "not installed"


def examine() -> dict[str, Any]:
    """Import every part that the project can use, and ask it what it can do here.

    Returns:
        Sections of plain values: `python`, `torch`, `gpus`, `dali`, `onnxruntime`, `tensorrt`,
        `tensorrt_rtx`, `training` and `prediction`. The `status` of a part names what is missing or broken.
    """
    torch = _import("torch")
    return {
        "python": {
            "version": platform.python_version(),
            "platform": platform.platform(),
            "cpu_cores": usable_cores(),
            "alexnet": installed_version("alexnet") or NOT_INSTALLED,
        },
        "torch": _library("torch", _torch_builds),
        "gpus": _gpus(torch),
        "dali": _library("nvidia.dali"),
        "onnxruntime": _library(
            "onnxruntime", lambda module: {"providers_built_in": list(module.get_available_providers())}
        ),
        "tensorrt": _library("tensorrt"),
        "tensorrt_rtx": _library("tensorrt_rtx"),
        "training": _training(torch),
        "prediction": _prediction(),
    }


def _import(name: str) -> ModuleType | str:
    """Import a module; where that fails, return one line with the reason."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        root = (error.name or "").split(".")[0]
        return NOT_INSTALLED if root == name.split(".")[0] else f"broken: {error}"
    except Exception as error:  # a broken shared library may raise anything; the report is for that
        return f"broken: {str(error).splitlines()[0][:200]}"


def _library(
    name: str, details: Callable[[ModuleType], dict[str, Any]] = lambda module: {}
) -> dict[str, Any]:
    module = _import(name)
    if isinstance(module, str):
        return {"status": module}
    return {"status": "ok", "version": str(getattr(module, "__version__", "unknown")), **details(module)}


def _torch_builds(torch: ModuleType) -> dict[str, Any]:
    return {
        "cuda_built_for": torch.version.cuda,
        "cuda_available": torch.cuda.is_available(),
        "nccl": torch.distributed.is_nccl_available(),
        "gloo": torch.distributed.is_gloo_available(),
    }


def _gpus(torch: ModuleType | str) -> list[dict[str, Any]]:
    if isinstance(torch, str) or not torch.cuda.is_available():
        return []
    every = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [
        {
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "memory_gib": round(gpu.total_memory / 2**30, 1),
        }
        for gpu in every
    ]


def _training(torch: ModuleType | str) -> dict[str, Any]:
    if isinstance(torch, str):
        return {"status": f"needs torch ({torch}): pip install 'alexnet[train]'"}
    from train.distributed.world import choose_device
    from train.optim.precision import choose_precision

    device = torch.device(choose_device("auto"))
    precision = choose_precision("auto", device)
    dali = not isinstance(_import("nvidia.dali"), str)
    return {
        "status": "ok",
        "device": device.type,
        "collectives": "nccl" if device.type == "cuda" else "gloo",
        "precision": f"{precision.name} ({precision.reason})",
        "decoding": f"DALI on the {'GPU' if device.type == 'cuda' else 'CPU'}" if dali else "Pillow",
    }


def _prediction() -> dict[str, Any]:
    try:
        machine = probe_machine()
    except ImportError as error:
        return {"status": f"needs ONNX Runtime ({error})"}
    gpu = machine.scan.gpus[0] if machine.scan.gpus else None
    engines = [f"{name} {version}" for name, version in tensorrt_versions().items()]
    running = [f"{name} {version}" for name, version in engine_libraries(machine).items()]
    provider = "CUDA" if gpu and machine.cuda_provider else "CPU"
    return {
        "status": "ok",
        "gpu": f"{gpu.name} ({gpu.architecture})" if gpu else f"none: {machine.scan.reason}",
        "onnx_models": f"ONNX Runtime, {provider}ExecutionProvider",
        "engines": _engine_words(machine, running),
        "engines_can_be_built_with": engines or "nothing: pip install 'alexnet[trt]' or 'alexnet[rtx]'",
    }


def _engine_words(machine: Machine, running: list[str]) -> str:
    if running:
        return f"run with {' or '.join(running)}"
    return f"cannot run here: {why_no_library(machine)}" if machine.scan.gpus else "cannot run here"
