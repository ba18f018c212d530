"""ONNX to a TensorRT engine: one code path for `tensorrt` (10, 11) and `tensorrt_rtx`.

`tensorrt` builds on a GPU, for that GPU. `tensorrt_rtx` builds ahead of time, without one, for every GPU
generation that it offers; the weights are stored once, so that more generations make no larger plan.
"""

from __future__ import annotations

import importlib
import logging
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import UserError
from infer.backends import tensorrt_versions
from infer.bundle import INPUT_NAME, Engine, Precision
from infer.cuda import GpuScan, scan_gpus
from infer.tensorrt_log import make_logger

log = logging.getLogger("infer")

# The engine is tuned for this batch, which is also what prediction sends unless it is told otherwise.
TUNED_BATCH = 32
# "Cannot compile operation for Turing (SM75): FP32 GEMM is not supported", says tensorrt_rtx 1.7.
_RTX_CANNOT: dict[Precision, frozenset[str]] = {
    "fp32": frozenset({"sm75"}),
    "fp16": frozenset(),
    "int8": frozenset({"sm75"}),
}


class BuildError(RuntimeError):
    """TensorRT refused the network; carries the parser's or the builder's messages."""

    exit_code = 1


@dataclass(frozen=True)
class Builder:
    """A TensorRT library that can build here, and for which GPUs it will."""

    library: Literal["tensorrt", "tensorrt_rtx"]
    gpus: tuple[str, ...]
    note: str


def choose_builder(versions: dict[str, str], scan: GpuScan, wanted: tuple[str, ...] = ()) -> Builder:
    """`tensorrt` where there is a GPU for it, else `tensorrt_rtx` ahead of time.

    Args:
        versions: the libraries that are installed, as `infer.backends.tensorrt_versions` lists them.
        scan: the GPUs of this machine.
        wanted: architectures that were asked for; others than this machine's are TensorRT-RTX's.
    Returns:
        The builder; no `gpus` means all that the library offers for the precision.
    Raises:
        UserError: neither can build here; names the extra to install.
    """
    if "tensorrt" in versions and scan.gpus and set(wanted) <= {scan.gpus[0].architecture}:
        gpu = scan.gpus[0]
        return Builder("tensorrt", (gpu.architecture,), f"for this machine's {gpu.name}")
    if "tensorrt_rtx" in versions:
        why = scan.reason or ("as asked" if wanted else "tensorrt is not installed")
        return Builder("tensorrt_rtx", wanted, f"ahead of time, since {why}")
    if "tensorrt" in versions and scan.gpus:
        raise UserError(
            f"--gpu {','.join(wanted)}: tensorrt builds for this machine's {scan.gpus[0].architecture} "
            "alone; TensorRT-RTX builds for others: pip install 'alexnet[rtx]'"
        )
    if "tensorrt" in versions:
        raise UserError(
            f"tensorrt builds on a GPU only, and {scan.reason}; TensorRT-RTX builds without one: "
            "pip install 'alexnet[rtx]'"
        )
    extra = "alexnet[trt]" if scan.gpus else "alexnet[rtx]"
    raise UserError(
        f"no TensorRT here: pip install '{extra}' (alexnet[trt] builds for this machine's GPU, alexnet[rtx] "
        "ahead of time and without a GPU)"
    )


def profile_batches(max_batch: int) -> tuple[int, int, int]:
    """Smallest, tuned and largest batch of an engine's one optimisation profile.

    >>> profile_batches(64)
    (1, 32, 64)
    """
    return 1, min(TUNED_BATCH, max_batch), max_batch


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    checkpoint_sha256: str,
    crop_px: int,
    max_batch: int,
    precision: Precision,
    gpus: tuple[str, ...] = (),
) -> Engine:
    """Build an engine and write it.

    The network is strongly typed: its precision is that of the ONNX file's tensors. fp32 is computed as
    such, without TF32.

    Args:
        onnx_path: the model, with the input that the bundle describes.
        engine_path: where the plan goes.
        checkpoint_sha256: stored in the plan as a part of the network's name, for whoever loads it.
        crop_px: side of the images, in pixels.
        max_batch: largest batch that the engine takes.
        precision: of the ONNX file.
        gpus: architectures to build for, as `sm89`; none for all that the library offers.
    Returns:
        What was built, for the manifest.
    Raises:
        UserError: no TensorRT can build here.
        BuildError: the library refused the model; with its messages.
    """
    builder = choose_builder(tensorrt_versions(), scan_gpus(), gpus)
    trt = importlib.import_module(builder.library)
    batches = profile_batches(max_batch)
    started = time.monotonic()
    plan, gpus = _build(trt, builder, onnx_path, f"alexnet {checkpoint_sha256}", crop_px, batches, precision)
    engine_path.write_bytes(plan)
    seconds = time.monotonic() - started
    log.info(
        "%s %s built %s, %.0f MB in %.1f s; loads on %s",
        *(builder.library, trt.__version__, builder.note, len(plan) / 1e6, seconds, ", ".join(gpus)),
    )
    if builder.library == "tensorrt_rtx":
        missing = ", ".join(sorted(_RTX_CANNOT[precision] & set(_offered(trt))))
        without = f" and, in {precision}, on {missing}" if missing else ""
        log.info(
            "TensorRT-RTX engines do not load on Hopper (sm90)%s: there, build with alexnet[trt]", without
        )
    return Engine(library=builder.library, version=trt.__version__, gpus=gpus, profile_batches=batches)


def _build(
    trt: Any,
    chosen: Builder,
    onnx_path: Path,
    name: str,
    crop_px: int,
    batches: tuple[int, int, int],
    precision: Precision,
) -> tuple[memoryview, tuple[str, ...]]:
    """The serialised plan and the GPU architectures that it is for."""
    messages: list[str] = []
    who = f"{trt.__name__} {trt.__version__}"
    logger = make_logger(trt, messages)
    builder = trt.Builder(logger)
    flags = trt.NetworkDefinitionCreationFlag
    # TensorRT 11 has no other networks and may drop the flag.
    strongly_typed = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(onnx_path.read_bytes()):
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise BuildError(f"{who} cannot parse the model: {_words(errors or messages)}")
    network.name = name
    config = builder.create_builder_config()
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT_NAME, *((batch, crop_px, crop_px, 3) for batch in batches))
    if config.add_optimization_profile(profile) < 0:
        raise BuildError(f"{who} refuses batches of {batches}: {_words(messages)}")
    gpus = chosen.gpus
    if chosen.library == "tensorrt_rtx":
        offered = tuple(gpu for gpu in _offered(trt) if gpu not in _RTX_CANNOT[precision])
        gpus = gpus or offered
        if unknown := sorted(set(gpus) - set(offered)):
            raise UserError(
                f"--gpu {unknown[0]}: {who} builds for {', '.join(offered)} in {precision}; "
                "others need tensorrt"
            )
        config.num_compute_capabilities = len(gpus)
        for index, gpu in enumerate(gpus):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, gpu.upper()), index):
                raise BuildError(f"{who} does not build for {gpu}: {_words(messages)}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"{who} cannot build the engine: {_words(messages)}")
    for message in messages:
        log.warning("%s: %s", trt.__name__, message)
    return memoryview(plan), gpus


def _offered(trt: Any) -> list[str]:
    """The GPU architectures that this TensorRT-RTX builds for, oldest first."""
    names = (re.fullmatch(r"SM(\d+)", name) for name in trt.ComputeCapability.__members__)
    return [f"sm{number}" for number in sorted(int(match[1]) for match in names if match)]


def _words(messages: list[str]) -> str:
    return " ".join(" | ".join(messages or ["no reason was given"]).split())
