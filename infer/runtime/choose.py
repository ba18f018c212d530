"""Running a bundle: one Protocol, ONNX Runtime and TensorRT behind it, and the choice between them.

What was asked for is what runs, or it is a `UserError`; what `auto` chose, and why, is said in a sentence.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from data_pipeline.common.errors import UserError
from infer.bundle.describe import rebuild_advice
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


class Choice(NamedTuple):
    """A backend that runs, and the sentence that says which and why."""

    backend: InferenceBackend
    sentence: str


@dataclass(frozen=True)
class Machine:
    """What there is to run a model on.

    Args:
        scan: GPUs, as the driver shows them.
        tensorrt: versions of the TensorRT libraries that are installed, by import name; none without a GPU.
        cuda_provider: whether ONNX Runtime was built with its CUDA provider.
    """

    scan: GpuScan
    tensorrt: dict[str, str]
    cuda_provider: bool


class Decision(NamedTuple):
    """What to run on what, and why; pure, made from the manifest and the machine alone."""

    runtime: Literal["onnx", "trt"]
    device: Literal["cpu", "cuda"]
    why: str


@lru_cache(maxsize=1)
def probe_machine() -> Machine:
    """Look at this machine. Loads ONNX Runtime, but no TensorRT; without a GPU none is looked for."""
    import onnxruntime

    scan = scan_gpus()
    return Machine(
        scan,
        tensorrt_versions() if scan.gpus else {},
        "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    )


def tensorrt_versions() -> dict[str, str]:
    """Versions of the TensorRT libraries that can be imported here, without importing them."""
    from importlib import metadata

    versions = {}
    for library, distributions in _DISTRIBUTIONS.items():
        if importlib.util.find_spec(library) is None:
            continue
        for distribution in distributions:
            try:
                versions[library] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                versions[library] = "unknown"
    return versions


def why_no_engine(bundle: Bundle, machine: Machine) -> str | None:
    """The reason why a bundle's engine cannot run here, or None if nothing speaks against it."""
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


def decide(bundle: Bundle, backend: BackendName, device: DeviceName, machine: Machine) -> Decision:
    """Choose the runtime and the device.

    Raises:
        UserError: what was asked for cannot be had here; says why.
    """
    no_engine = why_no_engine(bundle, machine)
    no_cuda = machine.scan.reason if not machine.scan.gpus else None
    if not no_cuda and not machine.cuda_provider:
        no_cuda = "this ONNX Runtime has no CUDA provider (install onnxruntime-gpu)"
    if backend == "trt":
        if device == "cpu":
            raise UserError("--backend trt with --device cpu: a TensorRT engine runs on a GPU only")
        if no_engine:
            advice = rebuild_advice(
                bundle.folder, has_gpu=bool(machine.scan.gpus), has_tensorrt=bool(machine.tensorrt)
            )
            raise UserError(f"--backend trt cannot be had: {'; '.join(filter(None, (no_engine, advice)))}")
        return Decision("trt", "cuda", "as asked")
    if backend == "auto" and device != "cpu" and not no_engine:
        return Decision("trt", "cuda", "its engine fits this GPU")
    about_engine = f"not its engine, since {no_engine}" if bundle.manifest.engine and no_engine else ""
    if device == "cuda":
        if no_cuda:
            raise UserError(f"--device cuda cannot be had: {no_cuda}")
        return Decision("onnx", "cuda", "as asked")
    if device == "cpu" or no_cuda:
        reason = "as asked" if device == "cpu" else f"{no_cuda}"
        return Decision("onnx", "cpu", reason if backend == "onnx" else about_engine or reason)
    return Decision("onnx", "cuda", about_engine or "the fastest there is for it here")


def choose_backend(
    bundle: Bundle, *, backend: BackendName = "auto", device: DeviceName = "auto", threads: int = 0
) -> Choice:
    """Load a bundle with what was asked for, or with the best there is here.

    Args:
        backend: `onnx`, `trt`, or `auto`: the engine where it can run, else ONNX Runtime.
        device: `cpu`, `cuda`, or `auto`: the GPU where there is one that the runtime can use.
        threads: see `OnnxBackend`.
    Raises:
        UserError: what was asked for cannot be had here.
        CorruptFileError: a file of the bundle that does not belong to its manifest.
    """
    decision = decide(bundle, backend, device, probe_machine())
    why = decision.why
    if decision.runtime == "trt":
        from infer.runtime.tensorrt import TensorRTBackend

        try:
            return _say(TensorRTBackend(bundle), why)
        except UserError as error:
            if backend == "trt":
                raise
            why = f"not its engine, since {error}"
            decision = decide(bundle, "onnx", device, probe_machine())
    if decision.device == "cuda":
        try:
            return _say(OnnxBackend(bundle, "cuda", threads=threads), why)
        except UserError as error:
            if device == "cuda":
                raise
            why = f"{why}; {error}" if why.startswith("not its engine") else str(error)
    return _say(OnnxBackend(bundle, "cpu", threads=threads), why)


def _say(backend: InferenceBackend, why: str) -> Choice:
    what = f"{backend.provider}, {backend.precision}, on {backend.device}"
    return Choice(backend, f"{what} ({why})")
