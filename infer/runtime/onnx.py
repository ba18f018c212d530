"""ONNX Runtime behind the `InferenceBackend` protocol, on a CPU or a CUDA device."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.machine import usable_cores
from infer.bundle.load import Bundle
from infer.bundle.manifest import metadata_mismatch
from infer.bundle.schema import INPUT_NAME
from infer.runtime.base import Outputs, check_batch
from infer.runtime.cuda import scan_gpus


class OnnxBackend:
    """ONNX Runtime on exactly one provider.

    Args:
        bundle: a verified bundle.
        device: `cpu`, or `cuda` for the first GPU.
        threads: of the CPU provider; 0 lets ONNX Runtime take one for each core this process may use.
        file: which ONNX file of the bundle; None for the one in the form for the device.
    Raises:
        UserError: the model cannot be loaded, or the CUDA provider not used, with ONNX Runtime's reason.
        CorruptFileError: the metadata in the model disagree with the manifest.
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
        self._memory, self._outputs = device, [output.name for output in manifest.outputs]
        if mismatch := metadata_mismatch(self._session.get_modelmeta().custom_metadata_map, manifest):
            raise CorruptFileError(f"{path} has {mismatch} than its bundle.json says")

    def run(self, images_NHWC: NDArray[np.uint8], *, features: bool = False) -> Outputs:
        check_batch(len(images_NHWC), self.max_batch)
        return Outputs(*self._session.run(self._wanted(features), {INPUT_NAME: images_NHWC}))

    def run_at(self, address: int, shape: tuple[int, ...], *, features: bool = False) -> Outputs:
        check_batch(shape[0], self.max_batch)
        binding = self._session.io_binding()
        binding.bind_input(INPUT_NAME, self._memory, 0, np.uint8, shape, address)
        for name in self._wanted(features):
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        return Outputs(*binding.copy_outputs_to_cpu())

    def _wanted(self, features: bool) -> list[str]:
        """The names of the outputs to compute: probabilities come first."""
        return self._outputs if features else self._outputs[:1]

    def close(self) -> None:
        self._session = None


def _make_session(path: Path, device: Literal["cpu", "cuda"], threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Its threads would else spin between batches, on the cores that decode.
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
    printed = io.StringIO()
    # Errors come as exceptions, too: one line is enough.
    options.log_severity_level = 4
    onnxruntime.set_default_logger_severity(4)
    try:
        with contextlib.redirect_stdout(printed):  # preload_dlls prints what it misses
            onnxruntime.preload_dlls()
        session = onnxruntime.InferenceSession(path, options, providers=[provider])
    except Exception as error:  # onnxruntime's exceptions share no base but this
        if "fallback to CPU" in str(error):
            # Its message when the CUDA provider could not be loaded at all.
            needs = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
            raise UserError(f"ONNX Runtime cannot load CUDA or cuDNN: {needs}") from error
        reason = f"{printed.getvalue()} {error}".strip().splitlines()[0]
        raise UserError(f"ONNX Runtime cannot use the GPU: {reason}") from error
    finally:
        onnxruntime.set_default_logger_severity(2)
    if session.get_providers()[0] != "CUDAExecutionProvider":
        raise UserError(f"ONNX Runtime gave {session.get_providers()[0]} where CUDA was asked for")
    return session
