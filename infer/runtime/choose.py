"""Choose between ONNX Runtime and TensorRT, CPU and GPU, for a bundle on this machine.

A runtime or device that was asked for is used, or it is a `UserError`; a sentence explains `auto`'s choice.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import installed_version
from infer.bundle.load import Bundle
from infer.runtime.base import InferenceBackend
from infer.runtime.cuda import GpuScan, scan_gpus
from infer.runtime.onnx import OnnxBackend

BackendName = Literal["auto", "onnx", "trt"]
DeviceName = Literal["auto", "cpu", "cuda"]
# The wheels' distribution names; the libraries are imported as the keys.
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}


RTX_GPUS = frozenset({"sm75", "sm80", "sm86", "sm89", "sm120", "sm121"})
"""GPUs that load TensorRT-RTX's engines. Hopper (sm90) and the Blackwells of data centres need `tensorrt`.
Source: `ComputeCapability` of TensorRT-RTX 1.7."""
FEW_IMAGES = 100
"""So few are done sooner on a CPU: with ONNX Runtime's CUDA provider ten images took an H200 2.5 s, and two
cores do 100 images of 224 pixels in 1.5 s."""


@dataclass(frozen=True)
class Machine:
    """The GPUs and runtimes of a machine.

    Attributes:
        scan: GPUs, as the driver shows them.
        tensorrt: versions of the TensorRT libraries that are installed, by import name; none without a GPU.
        cuda_provider: whether ONNX Runtime was built with its CUDA provider.
    """

    scan: GpuScan
    tensorrt: dict[str, str]
    cuda_provider: bool


class Decision(NamedTuple):
    """The runtime and device to use, and why; made from the manifest and the machine alone.

    Attributes:
        skips_engine: whether `why` is the reason that the bundle's engine is not used.
    """

    runtime: Literal["onnx", "trt"]
    device: Literal["cpu", "cuda"]
    why: str
    skips_engine: bool = False


@lru_cache(maxsize=1)
def probe_machine() -> Machine:
    """Examine this machine. Loads ONNX Runtime, but no TensorRT; without a GPU, TensorRT is not searched."""
    import onnxruntime

    scan = scan_gpus()
    return Machine(
        scan,
        tensorrt_versions() if scan.gpus else {},
        "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    )


def tensorrt_versions() -> dict[str, str]:
    """Versions of the TensorRT libraries that can be imported here, without importing them."""
    return {
        library: next(filter(None, map(installed_version, distributions)), "unknown")
        for library, distributions in _DISTRIBUTIONS.items()
        if importlib.util.find_spec(library) is not None
    }


def why_no_engine(bundle: Bundle, machine: Machine) -> str | None:
    """The reason why a bundle's engine cannot run here, or None if none is known."""
    engine = bundle.manifest.engine
    if engine is None:
        return "the bundle holds no engine"
    if not machine.scan.gpus:
        return machine.scan.reason or "there is no GPU"
    version = machine.tensorrt.get(engine.library)
    if version is None:
        extra = "trt" if engine.library == "tensorrt" else "rtx"
        return f"{engine.library} is not installed (pip install 'alexnet[{extra}]')"
    # A wheel may be a later packaging (".post1") of the same library.
    if version.partition(".post")[0] not in (engine.version, "unknown"):
        return f"the engine needs {engine.library} {engine.version}, and {version} is installed"
    gpu = machine.scan.gpus[0]
    if gpu.architecture not in engine.gpus:
        return f"the engine loads on {', '.join(engine.gpus)}, and {gpu.name} is {gpu.architecture}"
    return None


def why_no_cuda(machine: Machine) -> str | None:
    """The reason why ONNX Runtime cannot use a GPU here, or None if none is known."""
    if not machine.scan.gpus:
        return machine.scan.reason or "there is no GPU"
    if not machine.cuda_provider:
        return "this ONNX Runtime has no CUDA provider (install onnxruntime-gpu)"
    return None


def rebuild_advice(folder: Path, machine: Machine) -> str | None:
    """The command that builds an engine for this machine from a bundle, or None where none can be built."""
    # `tensorrt` is empty without a GPU.
    if not machine.tensorrt:
        return None
    runs = not machine.scan.gpus or engine_libraries(machine)
    first = "" if runs else f"{why_no_library(machine)}; then "
    return f"{first}build one for this machine: alexnet export {folder} --format trt"


def engine_libraries(machine: Machine) -> dict[str, str]:
    """The installed libraries, with their versions, whose engines the first GPU can load."""
    gpus = machine.scan.gpus
    return {
        name: version
        for name, version in machine.tensorrt.items()
        if gpus and (name != "tensorrt_rtx" or gpus[0].architecture in RTX_GPUS)
    }


def why_no_library(machine: Machine) -> str:
    """Why no installed library's engines run on a GPU that is there, and what to install."""
    gpu = machine.scan.gpus[0]
    if gpu.architecture in RTX_GPUS:
        return "neither TensorRT is installed: pip install 'alexnet[trt]' or 'alexnet[rtx]'"
    installed = "" if "tensorrt_rtx" not in machine.tensorrt else ", though tensorrt_rtx is installed"
    return f"{gpu.name} is {gpu.architecture}, which needs tensorrt{installed}: pip install 'alexnet[trt]'"


def decide(
    bundle: Bundle, backend: BackendName, device: DeviceName, machine: Machine, expected: int | None = None
) -> Decision:
    """Choose the runtime and the device.

    Args:
        bundle, backend, device, expected: see `choose_backend`.
        machine: this machine.
    Raises:
        UserError: what was asked for cannot be had here, with the reason.
    """
    no_engine = why_no_engine(bundle, machine)
    no_cuda = why_no_cuda(machine)
    if backend == "trt":
        if device == "cpu":
            raise UserError("--backend trt with --device cpu: a TensorRT engine runs on a GPU only")
        if no_engine:
            advice = rebuild_advice(bundle.folder, machine)
            raise UserError(f"--backend trt cannot be had: {'; '.join(filter(None, (no_engine, advice)))}")
        return Decision("trt", "cuda", "as asked")
    if backend == "auto" and device != "cpu" and not no_engine:
        return Decision("trt", "cuda", "its engine fits this GPU")
    if device == "cuda":
        if no_cuda:
            raise UserError(f"--device cuda cannot be had: {no_cuda}")
        return Decision("onnx", "cuda", "as asked")
    few = device == "auto" and not no_cuda and expected is not None and expected <= FEW_IMAGES
    runs_on: Literal["cpu", "cuda"] = "cpu" if device == "cpu" or no_cuda or few else "cuda"
    sooner = "so few images are done there before CUDA has started"
    if bundle.manifest.engine and no_engine and not (runs_on == "cpu" and backend == "onnx"):
        return _without_engine(runs_on, f"{no_engine}; {sooner}" if few else no_engine)
    if device == "cpu":
        return Decision("onnx", "cpu", "as asked")
    return Decision("onnx", runs_on, no_cuda or (sooner if few else "the fastest there is for it here"))


def _without_engine(device: Literal["cpu", "cuda"], reason: str) -> Decision:
    return Decision("onnx", device, f"not its engine, since {reason}", skips_engine=True)


def choose_backend(
    bundle: Bundle,
    *,
    backend: BackendName = "auto",
    device: DeviceName = "auto",
    threads: int = 0,
    expected: int | None = None,
) -> tuple[InferenceBackend, str]:
    """Load a bundle with what was asked for, or with the fastest that works here.

    Args:
        backend: `onnx`, `trt`, or `auto`: the engine where it can run, else ONNX Runtime.
        device: `cpu`, `cuda`, or `auto`: the GPU where there is one that the runtime can use.
        threads: see `OnnxBackend`.
        expected: how many images, or views of them, there will be; None if that is not known. `auto` leaves a
            few of them to the CPU, since ONNX Runtime's CUDA provider takes longer to start.
    Returns:
        The loaded backend, and the sentence that names it and why it was chosen.
    Raises:
        UserError: what was asked for cannot be had here.
        CorruptFileError: a file of the bundle that does not belong to its manifest.
    """
    decision = decide(bundle, backend, device, probe_machine(), expected)
    if decision.runtime == "trt":
        from infer.runtime.tensorrt import TensorRTBackend

        try:
            return _explained(TensorRTBackend(bundle), decision.why)
        except UserError as error:
            if backend == "trt":
                raise
            decision = _without_engine(
                decide(bundle, "onnx", device, probe_machine(), expected).device, str(error)
            )
    why = decision.why
    if decision.device == "cuda":
        try:
            return _explained(OnnxBackend(bundle, "cuda", threads=threads), why)
        except UserError as error:
            if device == "cuda":
                raise
            why = f"{why}; {error}" if decision.skips_engine else str(error)
    return _explained(OnnxBackend(bundle, "cpu", threads=threads), why)


def _explained(backend: InferenceBackend, why: str) -> tuple[InferenceBackend, str]:
    return backend, f"{backend.provider}, {backend.precision}, on {backend.device} ({why})"
