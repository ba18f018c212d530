"""Choosing what runs a bundle: what was asked for or an error, and a sentence that says which and why."""

from __future__ import annotations

import ctypes
import doctest
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import pytest

import infer.export.options
import infer.predict.rows
import infer.predict.table
from data_pipeline.common.errors import CorruptFileError, UserError
from infer.bundle.load import Bundle
from infer.bundle.manifest import Manifest
from infer.runtime.choose import (
    FEW_IMAGES,
    RTX_GPUS,
    BackendName,
    DeviceName,
    Machine,
    choose_backend,
    decide,
    engine_libraries,
    probe_machine,
    rebuild_advice,
    why_no_engine,
)
from infer.runtime.cuda import CudaError, CudaSession, Gpu, GpuScan, scan_gpus
from infer.runtime.onnx import OnnxBackend
from infer.runtime.tensorrt import TensorRTBackend, make_logger
from tests.helpers.infer_samples import tiny_manifest, with_engine

NO_GPU = GpuScan((), "no NVIDIA driver")
L4 = GpuScan((Gpu("NVIDIA L4", "sm89"),), None)
HOPPER = GpuScan((Gpu("NVIDIA H200", "sm90"),), None)
CPU_MACHINE = Machine(NO_GPU, {"tensorrt_rtx": "1.7"}, cuda_provider=True)
GPU_MACHINE = Machine(L4, {"tensorrt_rtx": "1.7"}, cuda_provider=True)


def bundle_of(manifest: Manifest) -> Bundle:
    return Bundle(Path("nowhere"), manifest)


def test_auto_backend_takes_the_engine_where_it_fits() -> None:
    decision = decide(bundle_of(with_engine()), "auto", "auto", GPU_MACHINE)
    assert decision[:3] == ("trt", "cuda", "its engine fits this GPU")


@pytest.mark.parametrize(
    ("manifest", "machine", "runtime", "device", "why"),
    [
        (with_engine(), CPU_MACHINE, "onnx", "cpu", "not its engine, since no NVIDIA driver"),
        (tiny_manifest(), CPU_MACHINE, "onnx", "cpu", "no NVIDIA driver"),
        (tiny_manifest(), GPU_MACHINE, "onnx", "cuda", "the fastest there is for it here"),
        (
            with_engine(),
            Machine(HOPPER, {"tensorrt_rtx": "1.7"}, True),
            "onnx",
            "cuda",
            "not its engine, since the engine loads on sm89, and NVIDIA H200 is sm90",
        ),
        (
            with_engine(),
            Machine(L4, {"tensorrt_rtx": "1.8"}, True),
            "onnx",
            "cuda",
            "not its engine, since the engine needs tensorrt_rtx 1.7, and 1.8 is installed",
        ),
        (
            with_engine("tensorrt", "11.0"),
            Machine(L4, {"tensorrt_rtx": "1.7"}, True),
            "onnx",
            "cuda",
            "not its engine, since tensorrt is not installed (pip install 'alexnet[trt]')",
        ),
        (
            tiny_manifest(),
            Machine(L4, {}, False),
            "onnx",
            "cpu",
            "this ONNX Runtime has no CUDA provider (install onnxruntime-gpu)",
        ),
    ],
)
def test_auto_backend_logs_why_it_skips_the_engine(
    manifest: Manifest, machine: Machine, runtime: str, device: str, why: str
) -> None:
    decision = decide(bundle_of(manifest), "auto", "auto", machine)
    assert decision == (runtime, device, why, why.startswith("not its engine"))


@pytest.mark.parametrize(
    ("backend", "device", "machine", "words"),
    [
        ("trt", "cpu", GPU_MACHINE, "runs on a GPU only"),
        ("trt", "auto", CPU_MACHINE, "--backend trt cannot be had: no NVIDIA driver"),
        ("auto", "cuda", CPU_MACHINE, "--device cuda cannot be had: no NVIDIA driver"),
        ("onnx", "cuda", CPU_MACHINE, "--device cuda cannot be had"),
        ("onnx", "cuda", Machine(L4, {}, False), "no CUDA provider"),
        ("trt", "cuda", Machine(L4, {}, True), r"pip install 'alexnet\[rtx\]'"),
        (
            "trt",
            "cuda",
            Machine(L4, {"tensorrt_rtx": "1.8"}, True),
            "and 1.8 is installed; build one for this machine: alexnet export nowhere --format trt$",
        ),
    ],
)
def test_named_backend_that_is_not_available_is_an_error(
    backend: BackendName, device: DeviceName, machine: Machine, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        decide(bundle_of(with_engine()), backend, device, machine)


def test_few_images_are_left_to_the_cpu_unless_told_otherwise() -> None:
    onnx, few = bundle_of(tiny_manifest()), "so few images are done there before CUDA has started"
    assert decide(onnx, "auto", "auto", GPU_MACHINE, FEW_IMAGES) == ("onnx", "cpu", few, False)
    for backend, device, expected in (
        ("auto", "auto", FEW_IMAGES + 1), ("auto", "auto", None), ("onnx", "cuda", 1), ("auto", "cuda", 1),
    ):  # fmt: skip
        assert decide(onnx, backend, device, GPU_MACHINE, expected)[:2] == ("onnx", "cuda")  # type: ignore[arg-type]
    assert decide(bundle_of(with_engine()), "auto", "auto", GPU_MACHINE, 1)[:2] == ("trt", "cuda")
    assert decide(onnx, "auto", "auto", CPU_MACHINE, 1).why == "no NVIDIA driver"
    hopper = Machine(HOPPER, {"tensorrt_rtx": "1.7"}, True)
    skipped = decide(bundle_of(with_engine()), "auto", "auto", hopper, 1)
    assert skipped[:2] == ("onnx", "cpu") and skipped.why.endswith(f"NVIDIA H200 is sm90; {few}")


def test_hopper_is_told_to_install_tensorrt() -> None:
    assert engine_libraries(Machine(L4, {"tensorrt": "11.0", "tensorrt_rtx": "1.7"}, True)) == {
        "tensorrt": "11.0", "tensorrt_rtx": "1.7"
    }  # fmt: skip
    assert engine_libraries(Machine(HOPPER, {"tensorrt": "11.0", "tensorrt_rtx": "1.7"}, True)) == {
        "tensorrt": "11.0"
    }
    only_rtx = Machine(HOPPER, {"tensorrt_rtx": "1.7"}, True)
    assert engine_libraries(only_rtx) == {}
    assert rebuild_advice(Path("b"), only_rtx) == (
        "NVIDIA H200 is sm90, which needs tensorrt, though tensorrt_rtx is installed: "
        "pip install 'alexnet[trt]'; then build one for this machine: alexnet export b --format trt"
    )
    trt = pytest.importorskip("tensorrt_rtx")
    offered = {name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert offered == RTX_GPUS


def test_named_backend_is_the_one_that_runs() -> None:
    both = bundle_of(with_engine())
    assert decide(both, "onnx", "auto", GPU_MACHINE)[:2] == ("onnx", "cuda")
    assert decide(both, "onnx", "cpu", GPU_MACHINE) == ("onnx", "cpu", "as asked", False)
    assert decide(both, "auto", "cpu", GPU_MACHINE) == ("onnx", "cpu", "as asked", False)
    assert decide(both, "trt", "auto", GPU_MACHINE) == ("trt", "cuda", "as asked", False)
    with pytest.raises(UserError, match="the bundle holds no engine"):
        decide(bundle_of(tiny_manifest()), "trt", "auto", GPU_MACHINE)


@pytest.mark.skipif(bool(scan_gpus().gpus), reason="this machine has a GPU")
def test_probe_of_a_machine_without_a_gpu(bundle: Bundle) -> None:
    backend, sentence = choose_backend(bundle)
    assert (backend.name, backend.device, backend.precision, backend.max_batch) == ("onnx", "cpu", "fp32", 8)
    assert sentence.startswith(f"{backend.provider}, fp32, on cpu (not its engine, since no NVIDIA driver")
    assert "CPUExecutionProvider" in backend.provider
    backend.close()
    with pytest.raises(UserError, match="cannot be had"):
        choose_backend(bundle, device="cuda")
    with pytest.raises(UserError, match="cannot be had"):
        choose_backend(bundle, backend="trt")
    assert scan_gpus().reason == "no NVIDIA driver on this machine (libcuda.so.1 is not there)"
    with pytest.raises(CudaError, match="no NVIDIA driver"):
        CudaSession()
    assert why_no_engine(bundle, probe_machine()) == scan_gpus().reason


@pytest.mark.skipif(bool(scan_gpus().gpus), reason="this machine has a GPU")
def test_onnx_runtime_does_not_fall_back_to_the_cpu(
    bundle: Bundle, capfd: pytest.CaptureFixture[str]
) -> None:
    # Past the look at the GPUs: the session itself refuses, too.
    with pytest.raises(UserError, match=r"cannot load CUDA or cuDNN: pip install"):
        OnnxBackend(bundle, "cuda")
    assert capfd.readouterr() == ("", "")  # the reason is in the error, and nowhere else


@pytest.mark.parametrize("n", [0, 9])
def test_batch_above_the_limit_is_refused_not_cut(bundle: Bundle, n: int) -> None:
    backend = OnnxBackend(bundle, "cpu")
    with pytest.raises(ValueError, match=f"a batch of {n}; the model takes 1 to 8"):
        backend.run(np.zeros((n, 56, 56, 3), np.uint8))
    backend.close()
    backend.close()


def test_labels_in_the_model_must_be_those_of_the_manifest(bundle: Bundle) -> None:
    classes = tuple(reversed(bundle.manifest.classes))
    relabelled = msgspec.structs.replace(bundle.manifest, classes=classes)
    with pytest.raises(CorruptFileError, match="other labels"):
        OnnxBackend(Bundle(bundle.folder, relabelled), "cpu")
    other = msgspec.structs.replace(bundle.manifest.checkpoint, sha256="2" * 64)
    foreign = msgspec.structs.replace(bundle.manifest, checkpoint=other)
    with pytest.raises(CorruptFileError, match="another checkpoint"):
        OnnxBackend(Bundle(bundle.folder, foreign), "cpu")


def test_engine_calls_match_tensorrts_signatures() -> None:
    """Without a GPU no engine runs; the bindings at least say that these are the calls."""
    trt = pytest.importorskip("tensorrt_rtx")
    number, yes = "typing.SupportsInt", "-> bool"
    for owner, name, *parts in (
        (trt.Runtime, "deserialize_cuda_engine", "serialized_engine: typing_extensions.Buffer"),
        (trt.ICudaEngine, "get_tensor_name", f"index: {number}) -> str"),
        (trt.ICudaEngine, "get_tensor_dtype", "name: str)", "tensorrt_rtx.DataType"),
        (trt.ICudaEngine, "get_tensor_profile_shape", f"name: str, profile_index: {number})", "list["),
        (trt.ICudaEngine, "create_execution_context", "tensorrt_rtx.IExecutionContext"),
        (trt.IExecutionContext, "set_input_shape", "name: str, shape: tuple)", yes),
        (trt.IExecutionContext, "set_tensor_address", f"name: str, memory: {number})", yes),
        (trt.IExecutionContext, "execute_async_v3", f"stream_handle: {number})", yes),
    ):
        for part in parts:
            assert part in getattr(owner, name).__doc__, (name, getattr(owner, name).__doc__)
    assert isinstance(trt.ICudaEngine.name, property)
    assert isinstance(trt.ICudaEngine.num_io_tensors, property)
    assert isinstance(trt.ICudaEngine.num_optimization_profiles, property)
    assert (trt.DataType.UINT8.name, trt.DataType.FLOAT.name) == ("UINT8", "FLOAT")
    messages: list[str] = []
    logger = make_logger(trt, messages)
    logger.log(trt.ILogger.ERROR, "broken\nin two lines")
    logger.log(trt.ILogger.WARNING, "careful")
    logger.log(trt.ILogger.INFO, "by the way")
    assert messages == ["broken in two lines", "careful"]
    assert trt.Runtime(logger) is not None


@pytest.mark.gpu
def test_engine_is_compared_with_its_manifest(bundle: Bundle) -> None:
    if reason := why_no_engine(bundle, probe_machine()):
        pytest.skip(reason)
    manifest = bundle.manifest
    other = msgspec.structs.replace(manifest.checkpoint, sha256="2" * 64)
    for changed, words in (
        (msgspec.structs.replace(manifest, max_batch=4), "takes up to"),
        (msgspec.structs.replace(manifest, checkpoint=other), "another checkpoint"),
    ):
        with pytest.raises(CorruptFileError, match=words):
            TensorRTBackend(Bundle(bundle.folder, changed))


def test_runtime_docstring_examples_run() -> None:
    for module in (infer.export.options, infer.predict.rows, infer.predict.table):
        result = doctest.testmod(module)
        assert result.failed == 0 and result.attempted > 0, module


@pytest.mark.gpu
def test_gpu_memory_round_trips() -> None:
    with closing(CudaSession()) as cuda:
        sent, received = cuda.pinned((1000, 3), np.float32), cuda.pinned((1000, 3), np.float32)
        sent[:] = np.random.default_rng(0).random((1000, 3), np.float32)
        pointer = cuda.allocate(sent.nbytes)
        cuda.copy_in(pointer, sent)
        cuda.copy_out(received, pointer)
        cuda.synchronize()
        np.testing.assert_array_equal(received, sent)
        with pytest.raises(CudaError, match="cuMemAlloc"):
            cuda.allocate(ctypes.c_size_t(-1).value // 2)


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "device"), [("trt", "cuda"), ("onnx", "cuda")])
def test_gpu_probabilities_match_the_cpus(bundle: Bundle, backend: BackendName, device: DeviceName) -> None:
    if backend == "trt" and (reason := why_no_engine(bundle, probe_machine())):
        pytest.skip(reason)
    images = np.random.default_rng(0).integers(0, 256, (8, 56, 56, 3), dtype=np.uint8)
    cpu = OnnxBackend(bundle, "cpu")
    found, sentence = choose_backend(bundle, backend=backend, device=device)
    try:
        assert sentence.endswith("(as asked)") and found.device != "cpu"
        for n in (8, 1, 5):
            by_gpu, by_cpu = found.run(images[:n]), cpu.run(images[:n])
            np.testing.assert_allclose(by_gpu.probabilities, by_cpu.probabilities, atol=1e-4)
    finally:
        found.close()
        cpu.close()
