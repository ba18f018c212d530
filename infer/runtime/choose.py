"""Running a bundle: one Protocol, ONNX Runtime and TensorRT behind it, and the choice between them.

What was asked for is what runs, or it is a `UserError`; what `auto` chose, and why, is said in a sentence.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.machine import usable_cores as usable_cores
from infer.bundle.describe import rebuild_advice
from infer.bundle.load import INPUT_NAME, OUTPUT_NAME, Bundle
from infer.bundle.metadata import foreign_metadata
from infer.runtime.cuda import GpuScan, scan_gpus

BackendName = Literal["auto", "onnx", "trt"]
DeviceName = Literal["auto", "cpu", "cuda"]
# The wheels' distribution names; the libraries are imported as the keys.
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx"),
}


class InferenceBackend(Protocol):
    """A loaded model. `run` is for one thread at a time; `close` gives back what it holds.

    Attributes:
        name: `onnx` or `trt`.
        provider: who computes, e.g. `ONNX Runtime 1.31.1 CPUExecutionProvider`.
        device: `cpu`, or the GPU's name.
        precision: as the bundle says.
        max_batch: most images that one `run` takes.
    """

    name: str
    provider: str
    device: str
    precision: str
    max_batch: int

    def run(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Probabilities (n, classes) for uint8 RGB images (n, crop, crop, 3), 1 <= n <= max_batch."""
        ...

    def run_at(self, address: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """As `run`, for contiguous images in the memory of the model's own device."""
        ...

    def close(self) -> None:
        """Free what the model holds; a second call does nothing."""
        ...


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


class OnnxBackend:
    """ONNX Runtime on exactly one provider.

    Args:
        bundle: a verified bundle.
        device: `cpu`, or `cuda` for the first GPU.
        threads: of the CPU provider; 0 lets ONNX Runtime take one for each core this process may use.
        file: which ONNX file of the bundle; None for the one that is meant for the device.
    Raises:
        UserError: the model cannot be loaded, or the CUDA provider not used, with ONNX Runtime's reason.
        CorruptFileError: the labels or the preprocessing in the model are not those of the manifest.
    """

    name = "onnx"

    def __init__(
        self, bundle: Bundle, device: Literal["cpu", "cuda"], *, threads: int = 0, file: str | None = None
    ) -> None:
        import onnxruntime

        manifest = bundle.manifest
        self.precision: str = manifest.precision
        self.max_batch = manifest.max_batch
        path = bundle.cpu_path if device == "cpu" else bundle.onnx_path
        path = path if file is None else bundle.folder / file
        self._session = _make_session(path, device, threads or usable_cores())
        (provider, *_) = self._session.get_providers()
        self.provider = f"ONNX Runtime {onnxruntime.__version__} {provider}"
        self.device = "cpu" if device == "cpu" else scan_gpus().gpus[0].name
        self._memory = device
        if strange := foreign_metadata(self._session.get_modelmeta().custom_metadata_map, manifest):
            raise CorruptFileError(f"{path} has {strange} than its bundle.json says")

    def run(self, images_NHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        check_batch(images_NHWC, self.max_batch)
        probabilities_NC: NDArray[np.float32] = self._session.run([OUTPUT_NAME], {INPUT_NAME: images_NHWC})[0]
        return probabilities_NC

    def run_at(self, address: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        _check_count(shape[0], self.max_batch)
        binding = self._session.io_binding()
        binding.bind_input(INPUT_NAME, self._memory, 0, np.uint8, shape, address)
        binding.bind_output(OUTPUT_NAME)
        self._session.run_with_iobinding(binding)
        probabilities_NC: NDArray[np.float32] = binding.copy_outputs_to_cpu()[0]
        return probabilities_NC

    def close(self) -> None:
        self._session = None


def check_batch(images_NHWC: NDArray[np.uint8], max_batch: int) -> None:
    """Raise ValueError for a batch that is empty or above the bundle's limit: it is never cut silently."""
    _check_count(len(images_NHWC), max_batch)


def _check_count(count: int, max_batch: int) -> None:
    if not 1 <= count <= max_batch:
        raise ValueError(f"a batch of {count}; the model takes 1 to {max_batch}")


def _make_session(path: Path, device: Literal["cpu", "cuda"], threads: int) -> Any:
    import contextlib
    import io

    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Between batches its threads would wait by computing, on the cores that decode.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if device == "cpu":
        try:
            return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions share no base but this
            raise UserError(f"ONNX Runtime cannot load the model: {str(error).splitlines()[0]}") from error
    # Without this, a session that was asked for CUDA alone silently runs on the CPU.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # TF32 keeps 10 bits of the mantissa: it is not the fp32 that the bundle promises.
    provider = ("CUDAExecutionProvider", {"device_id": "0", "use_tf32": "0"})
    chatter = io.StringIO()
    # Errors come as exceptions, too: one line is enough.
    options.log_severity_level = 4
    onnxruntime.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(chatter):  # preload_dlls prints what it misses
            onnxruntime.preload_dlls()
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    except Exception as error:  # onnxruntime's exceptions share no base but this
        if "fallback to CPU" in str(error):
            # What it says when its CUDA provider could not be loaded at all.
            needs = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
            raise UserError(f"ONNX Runtime cannot load CUDA or cuDNN: {needs}") from error
        reason = f"{chatter.getvalue()} {error}".strip().splitlines()[0]
        raise UserError(f"ONNX Runtime cannot use the GPU: {reason}") from error
    finally:
        onnxruntime.set_default_logger_severity(2)
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise UserError(f"ONNX Runtime gave {session.get_providers()[0]} where CUDA was asked for")
    return session
