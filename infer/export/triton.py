"""Write bundles as models of Triton Inference Server: `config.pbtxt`, the labels, and the model file.

    DIR/alexnet_fp32_onnx/config.pbtxt  labels.txt  1/model.onnx
    DIR/alexnet_fp32_trt/config.pbtxt   labels.txt  1/model.plan

Source: Triton Inference Server, `model_config.proto`, "Model Configuration" and "Model Repository".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import check_writable, fsync_path, writing_to
from data_pipeline.common.text import visible
from infer.bundle.load import Bundle
from infer.bundle.manifest import Manifest
from infer.bundle.schema import ENGINE_NAME, INPUT_NAME, ONNX_NAME, OUTPUT_NAME, Format, Precision, TensorSpec
from infer.bundle.write import copy_files, staging_folder, sync_files

LABELS_NAME, CONFIG_NAME = "labels.txt", "config.pbtxt"
_TYPES = {"uint8": "TYPE_UINT8", "float32": "TYPE_FP32"}
# By format: the bundle's file, Triton's usual name for it, its backend and its platform.
_KINDS: dict[Format, tuple[str, str, str, str]] = {
    "onnx": (ONNX_NAME, "model.onnx", "onnxruntime", "onnxruntime_onnx"),
    "trt": (ENGINE_NAME, "model.plan", "tensorrt", "tensorrt_plan"),
}


def model_name(format: Format, precision: Precision) -> str:
    """The model's name in Triton, which is its folder's."""
    return f"alexnet_{precision}_{format}"


def check_repository(root: Path, formats: Iterable[Format], precision: Precision) -> None:
    """Refuse to write over an existing model.

    Raises:
        UserError: a model of that name exists, or `root` is no folder or cannot be written to.
    """
    if root.exists() and not root.is_dir():
        raise UserError(f"--triton {root} is not a folder")
    check_writable(root, "name another folder with --triton")
    for format in formats:
        model = root / model_name(format, precision)
        if model.exists() or model.is_symlink():
            raise UserError(f"--triton: {model} is there already; remove it, or name another folder")


def check_engine(library: str) -> None:
    """Refuse an engine that Triton's TensorRT backend, which links TensorRT itself, cannot load.

    Raises:
        UserError: it is of TensorRT-RTX; the message names the alternatives.
    """
    if library == "tensorrt_rtx":
        raise UserError(
            "--triton: Triton's TensorRT backend loads engines of tensorrt, not of tensorrt_rtx: build with "
            "alexnet[trt] on a GPU, or take --format onnx"
        )


def write_repository(root: Path, bundles: Mapping[Format, Bundle]) -> list[Path]:
    """Write bundles as models of a Triton model repository; each appears whole or not at all.

    Args:
        root: the repository; created if missing, and left with its other models.
        bundles: verified bundles, by the format to write of each.
    Returns:
        The models' folders.
    Raises:
        UserError: a model of that name exists, or an engine that Triton cannot load.
        CorruptFileError: a bundle that changed while it was copied.
    """
    for format, bundle in bundles.items():
        check_repository(root, (format,), bundle.manifest.precision)
        if format == "trt":
            assert bundle.manifest.engine is not None
            check_engine(bundle.manifest.engine.library)
    with writing_to(root, "name another folder with --triton"):
        root.mkdir(parents=True, exist_ok=True)
    return [_write_model(root, format, bundle) for format, bundle in bundles.items()]


def _write_model(root: Path, format: Format, bundle: Bundle) -> Path:
    manifest = bundle.manifest
    source, name, _, _ = _KINDS[format]
    target = root / model_name(format, manifest.precision)
    with staging_folder(target) as staging:
        version = staging / "1"
        version.mkdir()
        copy_files(bundle, (source,), version)
        (version / source).rename(version / name)
        (staging / LABELS_NAME).write_text(
            "".join(f"{visible(label)}\n" for label in manifest.class_labels), encoding="utf-8"
        )
        (staging / CONFIG_NAME).write_text(config_text(manifest, format), encoding="utf-8")
        sync_files(version, (name,))
        sync_files(staging, (LABELS_NAME, CONFIG_NAME))
        staging.rename(target)
    fsync_path(root)
    return target


def config_text(manifest: Manifest, format: Format) -> str:
    """Format `config.pbtxt` of a bundle: its tensors, its largest batch, and dynamic batching.

    An engine's batches are those of its optimisation profile, and requests are gathered up to the batch that
    it is tuned for. ONNX Runtime has no such batch, so Triton's default applies there.

    Args:
        manifest: of the bundle.
        format: `onnx`, or `trt` of a bundle with an engine.
    """
    _, file, backend, platform = _KINDS[format]
    (images,), (probabilities, *features) = manifest.inputs, manifest.outputs
    assert (images.name, probabilities.name) == (INPUT_NAME, OUTPUT_NAME)
    outputs = ",\n".join([_tensor(probabilities, labels=LABELS_NAME), *map(_tensor, features)])
    engine = manifest.engine
    parameters = {"checkpoint_sha256": manifest.checkpoint.sha256, "precision": manifest.precision}
    batching, instances = "dynamic_batching { }", ""
    max_batch = manifest.max_batch
    if format == "trt":
        assert engine is not None
        _, tuned, max_batch = engine.profile_batches
        batching = f"dynamic_batching {{\n  preferred_batch_size: [ {tuned} ]\n}}"
        instances = "instance_group [\n  {\n    kind: KIND_GPU\n    count: 1\n  }\n]\n"
        parameters |= {"tensorrt": engine.version, "gpus": ",".join(engine.gpus)}
    rows = "".join(
        f'parameters {{\n  key: "{key}"\n  value {{ string_value: {_quoted(value)} }}\n}}\n'
        for key, value in parameters.items()
    )
    return f"""\
# Written by `alexnet export --triton`. Input: RGB pixels, resized and cropped, not normalised.
name: "{model_name(format, manifest.precision)}"
platform: "{platform}"
backend: "{backend}"
default_model_filename: "{file}"
max_batch_size: {max_batch}
input [
{_tensor(images, format="FORMAT_NHWC")}
]
output [
{outputs}
]
{batching}
{instances}{rows}"""


def _tensor(spec: TensorSpec, *, format: str = "", labels: str = "") -> str:
    """An input or output, whose dimensions are without the batch."""
    dims = ", ".join(map(str, spec.shape[1:]))
    lines = [f'name: "{spec.name}"', f"data_type: {_TYPES[spec.dtype]}"]
    lines += [f"format: {format}"] if format else []
    lines += [f"dims: [ {dims} ]"]
    lines += [f'label_filename: "{labels}"'] if labels else []
    return "\n".join(["  {", *(f"    {line}" for line in lines), "  }"])


def _quoted(text: str) -> str:
    """Quote a string for protobuf's text format; ASCII, in which JSON's escapes are the same."""
    return json.dumps(text.encode("ascii", "backslashreplace").decode())
