"""Build a TensorRT engine from an ONNX file: one code path for `tensorrt` (10, 11) and `tensorrt_rtx`.

`tensorrt` builds on a GPU, for that GPU. `tensorrt_rtx` builds ahead of time, without one, for every GPU
generation that it offers; the weights are stored once, so that more generations make no larger plan.
"""

from __future__ import annotations

import importlib
import logging
import re
import time
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from data_pipeline.common.errors import GateError, UserError
from data_pipeline.common.files import write_atomic
from infer.bundle.manifest import Manifest
from infer.bundle.schema import ENGINE_NAME, INPUT_NAME, ONNX_NAME, Engine, Precision, PrecisionCheck
from infer.bundle.write import measure_files
from infer.export.options import EngineOptions, choose_builder, profile_batches
from infer.runtime.choose import tensorrt_versions
from infer.runtime.cuda import scan_gpus
from infer.runtime.tensorrt import make_logger

log = logging.getLogger("infer")

# tensorrt_rtx 1.7: "Cannot compile operation for Turing (SM75): FP32 GEMM is not supported".
_RTX_CANNOT: dict[Precision, set[str]] = {"fp32": {"sm75"}, "fp16": set(), "int8": {"sm75"}}

_BYTES_PER_WEIGHT: dict[Precision, int] = {"fp32": 4, "fp16": 2, "int8": 1}
# The most and the least of a plan's size over its weights': kernels, tables and padding beside them, and what
# is left out because it is zero or folded away. In int8, biases and scales stay in float32.
_MOST, _MOST_INT8, _LEAST = 1.1, 1.4, 0.9
_OVERHEAD_BYTES = 12 * 2**20


class BuildError(RuntimeError):
    """TensorRT refused the network; carries the parser's or the builder's messages."""

    exit_code = 1


def add_engine(folder: Path, manifest: Manifest, max_batch: int, options: EngineOptions) -> Manifest:
    """Build the engine of the ONNX file in a folder, beside it, and check its size.

    Args:
        folder: of a bundle that is being written.
        manifest: describes the other files.
        max_batch: largest batch that the engine takes.
        options: see `EngineOptions`.
    Returns:
        The manifest with the engine, without a report.
    Raises:
        UserError, BuildError: see `build_engine`.
        GateError: see `check_plan_size`.
    """
    path = folder / ENGINE_NAME
    engine = build_engine(folder / ONNX_NAME, path, manifest, max_batch, options)
    check_plan_size(path, manifest.precision_check, manifest.precision)
    files = manifest.files | measure_files(folder, (ENGINE_NAME,))
    return replace(
        manifest,
        format="trt",
        max_batch=max_batch,
        files=dict(sorted(files.items())),
        engine=engine,
        report=None,
        rebuild=None,
    )


def build_engine(
    onnx_path: Path, engine_path: Path, manifest: Manifest, max_batch: int, options: EngineOptions
) -> Engine:
    """Build an engine and write it.

    The network is strongly typed: its precision is that of the ONNX file's tensors. fp32 is computed as
    such, without TF32.

    Args:
        onnx_path: the model.
        engine_path: where the plan goes.
        manifest: describes the model. The checkpoint's hash is stored in the plan as a part of the network's
            name, and compared when it is loaded.
        max_batch: largest batch that the engine takes.
        options: see `EngineOptions`.
    Returns:
        The engine's description, for the manifest.
    Raises:
        UserError: no TensorRT can build here, or not with these options.
        BuildError: the library refused the model; with its messages.
    """
    scan = scan_gpus()
    chosen = choose_builder(tensorrt_versions(), scan, options.gpus)
    ahead_of_time = chosen.library == "tensorrt_rtx"
    if options.timing_cache is not None and ahead_of_time:
        raise UserError(
            "--timing-cache is for tensorrt, and the engine is built with tensorrt_rtx, which times nothing "
            "while it builds; what it compiles on a GPU is kept in the user's cache"
        )
    started = time.monotonic()
    build = _Build(importlib.import_module(chosen.library), manifest.precision)
    build.parse(onnx_path, f"alexnet {manifest.checkpoint.sha256}")
    batches = profile_batches(max_batch, options.tuned_batch)
    build.set_batches(batches, manifest.preprocessing.crop_px)
    gpus = build.set_gpus(chosen.gpus) if ahead_of_time else chosen.gpus
    plan = build.run(options)
    engine_path.write_bytes(plan)
    log.info(
        "%s built %s, %.0f MB in %.1f s; loads on %s",
        *(build.who, chosen.note, len(plan) / 1e6, time.monotonic() - started, ", ".join(gpus)),
    )
    if ahead_of_time:
        build.log_missing_gpus()
    return Engine(
        library=chosen.library,
        version=build.trt.__version__,
        gpus=gpus,
        profile_batches=batches,
        builder_level=int(build.config.builder_optimization_level),
        built_on="" if ahead_of_time else scan.gpus[0].name,
    )


class _Build:
    """One build: the library's objects, and the messages that it logs."""

    def __init__(self, trt: Any, precision: Precision) -> None:
        self.trt, self.precision = trt, precision
        self.messages: list[str] = []
        self.who = f"{trt.__name__} {trt.__version__}"
        self.logger = make_logger(trt, self.messages)
        self.builder = trt.Builder(self.logger)
        self.config = self.builder.create_builder_config()

    def parse(self, onnx_path: Path, name: str) -> None:
        """Parse an ONNX file into the network to build."""
        flags = self.trt.NetworkDefinitionCreationFlag
        # TensorRT 11 has no other networks and may drop the flag.
        strongly_typed = 1 << int(flags.STRONGLY_TYPED) if hasattr(flags, "STRONGLY_TYPED") else 0
        self.network = self.builder.create_network(strongly_typed)
        parser = self.trt.OnnxParser(self.network, self.logger)
        if not parser.parse(onnx_path.read_bytes()):
            errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise BuildError(f"{self.who} cannot parse the model: {_words(errors or self.messages)}")
        self.network.name = name

    def set_batches(self, batches: tuple[int, int, int], crop_px: int) -> None:
        """Add the optimisation profile: the smallest, the tuned and the largest batch."""
        profile = self.builder.create_optimization_profile()
        profile.set_shape(INPUT_NAME, *((batch, crop_px, crop_px, 3) for batch in batches))
        if self.config.add_optimization_profile(profile) < 0:
            raise BuildError(f"{self.who} refuses batches of {batches}: {_words(self.messages)}")

    def run(self, options: EngineOptions) -> memoryview:
        """Build the network; returns the serialised plan."""
        if hasattr(self.trt.BuilderFlag, "TF32"):
            self.config.clear_flag(self.trt.BuilderFlag.TF32)
        if options.builder_level is not None:
            self.config.builder_optimization_level = options.builder_level
        path = options.timing_cache
        cache = None if path is None else self.attach_timing_cache(path)
        plan = self.builder.build_serialized_network(self.network, self.config)
        if plan is None:
            raise BuildError(f"{self.who} cannot build the engine: {_words(self.messages)}")
        if path is not None and cache is not None:
            write_atomic(path, bytes(memoryview(cache.serialize())))
        for message in self.messages:
            log.warning("%s: %s", self.trt.__name__, message)
        return memoryview(plan)

    def set_gpus(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """Set the GPUs that TensorRT-RTX builds for, the wanted ones or all that it offers; returns them."""
        offered = tuple(gpu for gpu in _offered(self.trt) if gpu not in _RTX_CANNOT[self.precision])
        gpus = wanted or offered
        if unknown := sorted(set(gpus) - set(offered)):
            raise UserError(
                f"--gpu {unknown[0]}: {self.who} builds for {', '.join(offered)} in {self.precision}; "
                "others need tensorrt"
            )
        self.config.num_compute_capabilities = len(gpus)
        for index, gpu in enumerate(gpus):
            if not self.config.set_compute_capability(
                getattr(self.trt.ComputeCapability, gpu.upper()), index
            ):
                raise BuildError(f"{self.who} does not build for {gpu}: {_words(self.messages)}")
        return gpus

    def log_missing_gpus(self) -> None:
        """Log the GPUs of today that engines of TensorRT-RTX do not load on."""
        missing = ", ".join(sorted(_RTX_CANNOT[self.precision] & set(_offered(self.trt))))
        without = f" and, in {self.precision}, on {missing}" if missing else ""
        log.info(
            "TensorRT-RTX engines do not load on Hopper (sm90)%s: there, build with alexnet[trt]", without
        )

    def attach_timing_cache(self, path: Path) -> Any:
        """Attach the timing cache in a file, or an empty one where there is no file; returns the cache.

        Raises:
            UserError: a file that is no timing cache of this library, version and GPU.
        """
        content = path.read_bytes() if path.exists() else b""
        num_before = len(self.messages)
        cache = self.config.create_timing_cache(content)
        # For a file that it cannot use, the library creates an empty cache and logs a warning.
        usable = cache is not None and len(self.messages) == num_before
        if not usable or not self.config.set_timing_cache(cache, False):
            why = _words(self.messages[num_before:])
            raise UserError(
                f"--timing-cache {path}: not one of {self.who} for this GPU; name another file ({why})"
            )
        return cache


def check_plan_size(path: Path, check: PrecisionCheck, precision: Precision) -> None:
    """Compare a plan's size with its weights': in another precision it is twice or half as large.

    Args:
        path: the plan.
        check: of the ONNX file that it was built from; it counts the weights.
        precision: the one that the plan should have.
    Raises:
        GateError: it is too large or too small for the precision.
    """
    nominal = _BYTES_PER_WEIGHT[precision] * sum(check.num_values.values())
    most = nominal * (_MOST_INT8 if precision == "int8" else _MOST) + _OVERHEAD_BYTES
    size = path.stat().st_size
    if not nominal * _LEAST <= size <= most:
        what = "much" if size > most else "little"
        raise GateError(
            f"gate: {path.name} has {size / 1e6:.0f} MB, too {what} for weights in {precision} "
            f"({nominal * _LEAST / 1e6:.0f} to {most / 1e6:.0f} MB); nothing was shipped"
        )


def _offered(trt: Any) -> list[str]:
    """The GPU architectures that this TensorRT-RTX builds for, oldest first."""
    names = (re.fullmatch(r"SM(\d+)", name) for name in trt.ComputeCapability.__members__)
    return [f"sm{number}" for number in sorted(int(match[1]) for match in names if match)]


def _words(messages: list[str]) -> str:
    return " ".join(" | ".join(messages or ["no reason was given"]).split())
