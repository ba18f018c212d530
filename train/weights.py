"""Import and export of weights: safetensors, torchvision's `alexnet` as trainers save it, and BVLC's as ONNX.

Imported weights become a run with one checkpoint, so that they can be evaluated, exported and served like any
other. Nothing in an imported file is executed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import writing_to
from data_pipeline.common.outputs import check_output
from data_pipeline.common.text import names_in, printable
from data_pipeline.transforms.preprocessing import Preprocessing
from train.checkpoints.foreign import find_weights
from train.checkpoints.format import MANIFEST, STATE, Pointer, Snapshot, write_pointer
from train.checkpoints.load import Checkpoint, load_checkpoint, make_model_with
from train.checkpoints.safe_load import Skipped, check_tensors, load_skipping
from train.checkpoints.share import encode_weights
from train.checkpoints.write import save_checkpoint
from train.config.load import decode_config
from train.config.schema import RunConfig
from train.optim.sgd import make_optimizer
from train.runs.folder import create_run

log = logging.getLogger("train")

Target = Literal["safetensors", "torchvision"]

TORCHVISION = RunConfig(
    recipe="torchvision", model=msgspec.structs.replace(RunConfig().model, name="owt", init="paper")
)
# Caffe feeds BGR in 0..255 minus a mean: the same as RGB in 0..1 minus a 255th of it, times 255.
CAFFE_MEAN = (122.67891434 / 255, 116.66876762 / 255, 104.00698793 / 255)
CAFFE = RunConfig(
    recipe="bvlc",
    model=msgspec.structs.replace(RunConfig().model, name="caffe", init="caffe"),
    preprocessing=Preprocessing(resize_px=256, crop_px=227, mean=CAFFE_MEAN, std=(1 / 255, 1 / 255, 1 / 255)),
)

_ADVICE = "what can come in is torchvision's `alexnet`, BVLC's as .onnx, or .safetensors as written here"


def export_weights(checkpoint: Checkpoint, path: Path, target: Target) -> None:
    """Write a checkpoint's weights alone.

    Args:
        checkpoint: a verified checkpoint.
        path: the file to write.
        target: `safetensors`, with configuration and classes in its metadata; or `torchvision`, a state
            dict that `torchvision.models.alexnet(num_classes=…)` loads.
    Raises:
        UserError: torchvision has no such network, nothing can be written there, or there is such a file:
            weights are never replaced.
    """
    check_output(path, "TARGET", None, "weights", named=checkpoint.folder.iterdir())
    if target == "torchvision":
        model = checkpoint.config.model
        if (model.name, model.hidden_units) != ("owt", 4096):
            raise UserError(
                "torchvision's alexnet is `owt` with 4096 hidden units; this checkpoint is "
                f"`{model.name}` with {model.hidden_units}"
            )
        weights = {name: tensor.contiguous() for name, tensor in checkpoint.weights.items()}
        with writing_to(path, "name another file"), path.open("wb") as file:
            torch.save(weights, file)
        return
    with writing_to(path, "name another file"):
        path.write_bytes(encode_weights(checkpoint, checkpoint.config))


def read_names(path: Path) -> tuple[str, ...]:
    """Read the names of classes, one a line, in the order of the logits.

    Raises:
        UserError: no such file, or see `names_in`.
    """
    try:
        return names_in(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"--classes {printable(path)} cannot be read: {error.strerror or error}") from error


def import_weights(path: Path, out: Path, classes: tuple[str, ...] | None = None) -> Path:
    """Make a run with one checkpoint from a file of weights.

    Args:
        path: `.safetensors` as `export_weights` writes it; `.pth`, `.pt`, `.pth.tar` or `.ckpt`, a state dict
            of torchvision's `alexnet`, alone or as a trainer wraps it; `.onnx`, BVLC's AlexNet.
        out: folder in which the run's folder is made.
        classes: names, in the order of the logits; None for those in the file, else for "0", "1", ….
    Returns:
        The checkpoint's folder.
    Raises:
        UserError: another kind of file, or another network's weights.
        CorruptFileError: a file that cannot be read as what its suffix claims.
    """
    readers = {".safetensors": _read_safetensors, ".onnx": _read_bvlc}
    readers |= dict.fromkeys((".pth", ".pt", ".pth.tar", ".pt.tar", ".ckpt"), _read_torch)
    suffix = next((suffix for suffix in readers if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise UserError(f"{path}: weights come in as {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if out.exists() and not out.is_dir():
        raise UserError(f"{printable(out)} is a file: name a folder for the new run")
    config, weights, named = readers[suffix](path)
    layers = [name for name, tensor in weights.items() if tensor.ndim == 2]
    if not layers:
        raise UserError(f"{path} holds no fully connected layer, so it is none of our networks")
    num_classes = len(weights[max(layers)])  # fc6, fc7, fc8; or 1, 4, 6
    labels_text: tuple[str, ...] = ()
    if classes is None and named is not None:
        classes, labels_text = named
    classes = classes or tuple(map(str, range(num_classes)))
    if len(classes) != num_classes:
        raise UserError(f"{path} has {num_classes} classes, and {len(classes)} names were given")
    crop_px = config.preprocessing.crop_px
    model = make_model_with(config.model, weights, num_classes, crop_px, path, advice=_ADVICE)
    optimizer, folder = make_optimizer(model, config.optimizer), create_run(out, config)
    saved = save_checkpoint(
        folder.checkpoints,
        Snapshot(
            step=0,
            epoch=0,
            samples_seen=0,
            config=config,
            classes=classes,
            metrics={},
            states={"model": model.state_dict(), "optimizer": optimizer.state_dict()},
            labels_text=labels_text,
        ),
    )
    write_pointer(folder.checkpoints, "best", Pointer(step=0, top1=None))
    write_pointer(folder.checkpoints, "last", Pointer(step=0, top1=None))
    return saved


Names = tuple[tuple[str, ...], tuple[str, ...]]
"""The classes, and their names for people, which may be none."""

Weights = tuple[RunConfig, dict[str, Tensor], Names | None]


def _read_safetensors(path: Path) -> Weights:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CorruptFileError(f"{path} cannot be read as safetensors: {error}") from error
    if "config" not in metadata or "classes" not in metadata:
        raise UserError(
            f"{path} does not say which network it is: it was not written by `checkpoint convert`"
        )
    try:
        config = decode_config(msgspec.json.decode(metadata["config"]))
        classes = msgspec.convert(json.loads(metadata["classes"]), tuple[str, ...])
        labels_text = msgspec.convert(json.loads(metadata.get("labels_text", "[]")), tuple[str, ...])
        if len(labels_text) not in (0, len(classes)):
            raise ValueError(f"{len(labels_text)} labels for {len(classes)} classes")
    except (ValueError, RecursionError, UserError) as error:
        raise CorruptFileError(f"{path} has metadata that cannot be read: {error}") from error
    return config, weights, (classes, labels_text)


def _read_torch(path: Path) -> Weights:
    if path.name == STATE and (path.parent / MANIFEST).exists():
        raise UserError(f"{path} is a checkpoint of ours already: use it as it is, or take weights out: --to")
    content = load_skipping(path)
    try:
        found = find_weights(content)
        for name, value in found.weights.items():
            if isinstance(value, Skipped):
                raise ValueError(f"{name[:100]} is a {value.name[:100]}")
        weights = msgspec.convert(found.weights, dict[str, Tensor])
        check_tensors(weights.values())
    except ValueError as error:
        raise UserError(f"{path} is not a state dict of tensors: {error}") from error
    if found.wrapping:
        log.info("%s: wrapped weights: %s", path, found.wrapping)
    return TORCHVISION, weights, None


def _read_bvlc(path: Path) -> Weights:
    """Read BVLC's weights under our names, the first convolution's channels reordered from BGR to RGB."""
    import onnx
    import onnx.numpy_helper
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except (DecodeError, OSError) as error:
        raise CorruptFileError(f"{path} cannot be read as ONNX: {error}") from error
    values = {tensor.name: tensor for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    names = [f"features.conv{i}" for i in range(1, 6)] + [f"classifier.fc{i}" for i in range(6, 9)]
    if len(layers) != len(names):
        raise UserError(f"{path} has {len(layers)} layers with weights, BVLC's AlexNet has {len(names)}")
    weights: dict[str, Any] = {}
    for name, node in zip(names, layers, strict=True):
        for part, source in zip(("weight", "bias"), node.input[1:3], strict=True):
            if source not in values or values[source].data_location == onnx.TensorProto.EXTERNAL:
                raise UserError(f"{path} does not hold the values of {source!r} itself")
            weights[f"{name}.{part}"] = torch.from_numpy(onnx.numpy_helper.to_array(values[source]).copy())
    weights["features.conv1.weight"] = weights["features.conv1.weight"].flip(1)
    return CAFFE, weights, None


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Verify a checkpoint and describe it as plain values."""
    checkpoint = load_checkpoint(folder)
    return {
        "folder": str(folder),
        "sha256": checkpoint.sha256,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "samples_seen": checkpoint.samples_seen,
        "changes": msgspec.to_builtins(checkpoint.progress.changes),
        "recipe": checkpoint.config.recipe,
        "model": checkpoint.config.model.name,
        "weights": checkpoint.weights_name,
        "parameters": sum(tensor.numel() for tensor in checkpoint.model_state.values()),
        "classes": len(checkpoint.classes),
        "crop_px": checkpoint.preprocessing.crop_px,
        "metrics": checkpoint.metrics,
    }
