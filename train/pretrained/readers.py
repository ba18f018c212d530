"""Reads a network's weights: of a run of ours, of a file, or torchvision's, which are fetched.

Nothing in a file is executed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import sha256_of
from data_pipeline.common.text import printable
from data_pipeline.transforms.preprocessing import Preprocessing
from train.checkpoints.foreign import find_weights
from train.checkpoints.format import MANIFEST, STATE
from train.checkpoints.load import Checkpoint, find_checkpoint, load_checkpoint
from train.checkpoints.safe_load import Skipped, check_tensors, load_plain
from train.config.load import decode_config
from train.config.schema import RunConfig
from train.pretrained.published import WORD, fetch_torchvision, published_classes

log = logging.getLogger("train")

OWN_DOWNLOAD = "fetch it by other means, and name the file with --init"
TORCHVISION = RunConfig(
    recipe=WORD, model=msgspec.structs.replace(RunConfig().model, name="owt", init="paper")
)
# Caffe feeds BGR in 0..255 minus a mean: the same as RGB in 0..1 minus a 255th of it, times 255.
CAFFE_MEAN = (122.67891434 / 255, 116.66876762 / 255, 104.00698793 / 255)
CAFFE = RunConfig(
    recipe="bvlc",
    model=msgspec.structs.replace(RunConfig().model, name="caffe", init="caffe"),
    preprocessing=Preprocessing(resize_px=256, crop_px=227, mean=CAFFE_MEAN, std=(1 / 255, 1 / 255, 1 / 255)),
)


@dataclass(frozen=True)
class Source:
    """The weights of a network, before they are compared with any.

    Attributes:
        description: what they are, for log lines.
        sha256: of the file, or of a checkpoint's state.
        config: the network and its preprocessing, as the file or its kind says.
        weights: by name.
        classes: in the order of the logits; None where the file does not name them.
        labels_text: names of the classes for people; empty where there are none.
    """

    description: str
    sha256: str
    config: RunConfig
    weights: dict[str, Tensor]
    classes: tuple[str, ...] | None
    labels_text: tuple[str, ...]


Content = tuple[RunConfig, dict[str, Tensor], tuple[str, ...] | None, tuple[str, ...]]
"""The content of a file: the last four fields of a `Source`."""


def read_source(name: str) -> Source | Checkpoint:
    """Read the weights that a name stands for.

    Args:
        name: a checkpoint or a run of ours (its best checkpoint), a file as `read_file` takes it, or
            `torchvision`, whose published weights are fetched.
    Raises:
        UserError: nothing of that name, another kind of file, or no download.
        CorruptFileError: a file that is damaged, or is not what its suffix claims.
    """
    if name == WORD:
        return read_file(fetch_torchvision(advice=OWN_DOWNLOAD))
    path = Path(name)
    if path.is_file() and path.name not in (STATE, MANIFEST):
        return read_file(path)
    try:
        folder = find_checkpoint(path)
    except UserError as error:
        raise UserError(f"{error}; name a run, a checkpoint, a file of weights, or {WORD}") from error
    return load_checkpoint(folder)


def read_file(path: Path) -> Source:
    """Read a file of weights.

    Args:
        path: `.safetensors` as `export_weights` writes it; `.pth`, `.pt`, `.pth.tar` or `.ckpt`, a state dict
            of torchvision's `alexnet`, alone or as a trainer wraps it; `.onnx`, BVLC's AlexNet.
    Raises:
        UserError: another kind of file, or another network's weights.
        CorruptFileError: a file that cannot be read as what its suffix claims.
    """
    readers: dict[str, Callable[[Path], Content]] = {".safetensors": _read_safetensors, ".onnx": _read_bvlc}
    readers |= dict.fromkeys((".pth", ".pt", ".pth.tar", ".pt.tar", ".ckpt"), _read_torch)
    suffix = next((suffix for suffix in readers if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise UserError(f"{path}: weights come in as {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    config, weights, classes, labels_text = readers[suffix](path)
    sha256 = sha256_of(path)
    if classes is None:
        classes, labels_text = published_classes(sha256)
    return Source(printable(path), sha256, config, weights, classes, labels_text)


def _read_safetensors(path: Path) -> Content:
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
    return config, weights, classes, labels_text


def _read_torch(path: Path) -> Content:
    if path.name == STATE and (path.parent / MANIFEST).exists():
        raise UserError(f"{path} is a checkpoint of ours already: use it as it is, or take weights out: --to")
    content = load_plain(path, skipping=True)
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
    return TORCHVISION, weights, None, ()


def _read_bvlc(path: Path) -> Content:
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
    return CAFFE, weights, None, ()
