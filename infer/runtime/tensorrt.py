"""A TensorRT engine behind the `InferenceBackend` protocol; running it needs a GPU."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.errors import CorruptFileError, GateError, UserError
from infer.bundle.load import Bundle
from infer.bundle.schema import ENGINE_NAME, INPUT_NAME
from infer.runtime.base import Outputs, check_batch
from infer.runtime.cuda import CudaError, CudaSession, scan_gpus
from infer.runtime.rtx_cache import RuntimeCache, cache_path


def make_logger(trt: Any, messages: list[str]) -> Any:
    """A TensorRT logger that collects warnings and errors, and writes nothing to the terminal.

    Args:
        trt: the library, `tensorrt` or `tensorrt_rtx`.
        messages: receives one line a message, the latest last.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                messages.append(" ".join(message.split()))

    return Logger()


class TensorRTBackend:
    """A bundle's engine on the first GPU: one context, one stream, pinned buffers of the largest batch.

    Args:
        bundle: a verified bundle with an engine.
    Raises:
        UserError: this machine cannot load the engine, with the library's reason.
        CorruptFileError: the engine was built from another checkpoint than the manifest names.
    """

    name = "trt"

    def __init__(self, bundle: Bundle) -> None:
        engine_facts, path = bundle.manifest.engine, bundle.engine_path
        assert engine_facts is not None and path is not None
        trt = importlib.import_module(engine_facts.library)
        self.precision: str = bundle.manifest.precision
        self.max_batch = bundle.manifest.max_batch
        self.provider = f"{engine_facts.library} {trt.__version__}"
        self.device = scan_gpus().gpus[0].name
        self._messages: list[str] = []
        self._compiled: RuntimeCache | None = None
        try:
            self._cuda = CudaSession()
        except CudaError as error:
            raise UserError(f"the GPU cannot be used: {error}") from error
        try:
            self._load(trt, path.read_bytes(), bundle)
        except BaseException:
            self.close()
            raise

    def _load(self, trt: Any, plan: bytes, bundle: Bundle) -> None:
        """Deserialise the plan, compare it with the manifest, and allocate the buffers."""
        manifest = bundle.manifest
        self._runtime = trt.Runtime(make_logger(trt, self._messages))
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise UserError(f"{self.provider} cannot load the engine: {self._reason()}")
        if manifest.checkpoint.sha256 not in self._engine.name:
            raise CorruptFileError(f"{bundle.engine_path} belongs to another checkpoint than its bundle")
        check_contract(self._engine, bundle)
        if hasattr(trt, "IRuntimeCache"):
            sha256, gpu = manifest.files[ENGINE_NAME].sha256, scan_gpus().gpus[0].architecture
            self._compiled = RuntimeCache(self._engine, cache_path(sha256, trt.__version__, gpu))
            self._context = self._compiled.context
        else:
            self._context = self._engine.create_execution_context()
        if self._context is None:
            raise UserError(f"{self.provider} has no memory for the engine: {self._reason()}")
        crop_px = manifest.preprocessing.crop_px
        self._images = self._cuda.pinned((self.max_batch, crop_px, crop_px, 3), np.uint8)
        self._images_gpu = self._cuda.allocate(self._images.nbytes)
        # Of each output, in the manifest's order: the probabilities, then the features.
        widths = [int(output.shape[-1]) for output in manifest.outputs]
        self._outputs = [self._cuda.pinned((self.max_batch, width), np.float32) for width in widths]
        self._outputs_gpu = [self._cuda.allocate(buffer.nbytes) for buffer in self._outputs]
        names = [INPUT_NAME, *(output.name for output in manifest.outputs)]
        for name, pointer in zip(names, [self._images_gpu, *self._outputs_gpu], strict=True):
            if not self._context.set_tensor_address(name, pointer):
                raise RuntimeError(f"TensorRT refused the buffer of {name}: {self._reason()}")

    def run(self, images_NHWC: NDArray[np.uint8], *, features: bool = False) -> Outputs:
        n = len(images_NHWC)
        check_batch(n, self.max_batch)
        self._cuda.activate()
        self._images[:n] = images_NHWC
        self._cuda.copy_in(self._images_gpu, self._images[:n])
        return self.run_at(self._images_gpu, tuple(images_NHWC.shape), features=features)

    def run_at(self, address: int, shape: tuple[int, ...], *, features: bool = False) -> Outputs:
        n = shape[0]
        self._cuda.activate()
        if not self._context.set_tensor_address(INPUT_NAME, address):
            raise RuntimeError(f"TensorRT refused the address of {INPUT_NAME}: {self._reason()}")
        if not self._context.set_input_shape(INPUT_NAME, shape):
            raise RuntimeError(f"TensorRT refused images of shape {shape}: {self._reason()}")
        if not self._context.execute_async_v3(self._cuda.stream):
            raise RuntimeError(f"TensorRT could not run the engine: {self._reason()}")
        wanted = self._outputs if features else self._outputs[:1]
        for buffer, pointer in zip(wanted, self._outputs_gpu, strict=False):
            self._cuda.copy_out(buffer[:n], pointer)
        self._cuda.synchronize()
        return Outputs(*(buffer[:n].copy() for buffer in wanted))

    def close(self) -> None:
        if self._compiled is not None:
            self._cuda.activate()
            self._compiled.save()
        # TensorRT's objects first, in the reverse of the order in which they were made.
        self._context = self._compiled = self._engine = self._runtime = None
        self._images, self._outputs = np.empty(0, np.uint8), []
        self._cuda.close()

    def _reason(self) -> str:
        return self._messages[-1] if self._messages else "no reason was given"


def load_for_gate(bundle: Bundle) -> TensorRTBackend:
    """Load the engine of a draft bundle on the GPU that it was built for.

    Raises:
        GateError: it does not load, though its manifest fits this machine.
    """
    try:
        return TensorRTBackend(bundle)
    except UserError as error:
        raise GateError(f"gate: the engine should run on this GPU and does not: {error}") from error


def engine_validity(bundle: Bundle) -> str | None:
    """The library's verdict on a plan before it is loaded: `valid`, `suboptimal`, or `invalid (why)`.

    Returns:
        None for `tensorrt`, which has no such query; `tensorrt_rtx` has one that needs no GPU.
    """
    facts, path = bundle.manifest.engine, bundle.engine_path
    assert facts is not None and path is not None
    trt = importlib.import_module(facts.library)
    if not hasattr(trt.Runtime, "get_engine_validity"):
        return None
    verdict, reasons = trt.Runtime(make_logger(trt, [])).get_engine_validity(path.read_bytes())
    why = [name for name, bit in trt.EngineInvalidityDiagnostics.__members__.items() if reasons & int(bit)]
    words = ", ".join(name.lower().replace("_", " ") for name in why)
    return f"{verdict.name.lower()}{f' ({words})' if words else ''}"


def check_contract(engine: Any, bundle: Bundle) -> None:
    """Compare an engine with its manifest: tensor names, types, and the optimisation profile.

    Raises:
        CorruptFileError: they differ.
    """
    manifest = bundle.manifest
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    dtypes = {name: engine.get_tensor_dtype(name).name.lower() for name in names}
    if dtypes != {INPUT_NAME: "uint8"} | {output.name: "float" for output in manifest.outputs}:
        raise CorruptFileError(f"{bundle.engine_path} has other tensors than its bundle: {dtypes}")
    if (profiles := engine.num_optimization_profiles) != 1:  # a context serves one profile
        raise CorruptFileError(
            f"{bundle.engine_path} has {profiles} optimisation profiles, and its bundle one"
        )
    crop_px, facts = manifest.preprocessing.crop_px, manifest.engine
    assert facts is not None
    found = tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(INPUT_NAME, 0))
    if found != tuple((batch, crop_px, crop_px, 3) for batch in facts.profile_batches):
        raise CorruptFileError(f"{bundle.engine_path} takes up to {found[2]}, not what its bundle says")
