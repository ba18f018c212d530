"""Export a checkpoint to ONNX with the contract inside: uint8 NHWC pixels in, probabilities out."""

from __future__ import annotations

import logging
import warnings
from importlib.metadata import version
from pathlib import Path

import msgspec
import onnx
import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable
from infer.bundle.schema import INPUT_NAME, OUTPUT_NAME, FeatureLayer
from infer.export.cpu_form import fold_normalization, share_weights, use_banded_lrn
from infer.export.options import DEFAULT_OPSET
from train.checkpoints.load import Checkpoint
from train.models.alexnet import Normalize

log = logging.getLogger("infer")

EXPORTER_MIN_OPSET = 18
"""The lowest that torch's exporter writes; below, ONNX's version converter takes over."""
MAX_ONNX_BYTES = 2**31 - 2**20  # protobuf's limit, less some room for the graph
# Warnings that the libraries raise for one another; nobody who exports can act on them.
_QUIET = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


class ContractModel(nn.Module):
    """The exported module: decoded pixels to probabilities.

    Args:
        checkpoint: the source of the weights and the preprocessing.
        half: whether the network computes in float16; normalisation, LRN and softmax stay in float32.
        features: a layer whose features are a second output, in float32.
    Shape:
        uint8 RGB (N, crop, crop, 3) -> float32 (N, classes), each row adding up to 1; with `features`, and
        float32 (N, D).
    """

    def __init__(
        self, checkpoint: Checkpoint, *, half: bool = False, features: FeatureLayer | None = None
    ) -> None:
        super().__init__()
        self.checkpoint, self.features = checkpoint, features
        self.normalize: nn.Module = Normalize(checkpoint.preprocessing)
        self.dtype = torch.float16 if half else torch.float32
        self.network = checkpoint.make_model().to(self.dtype)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        inputs_NCHW = self.normalize(images).to(self.dtype)
        if self.features is None:
            return torch.softmax(self.network(inputs_NCHW).float(), dim=1)
        logits_NC, features_ND = self.network.forward_features(inputs_NCHW, self.features)
        return torch.softmax(logits_NC.float(), dim=1), features_ND.float()


def export_for_cpu(
    model: ContractModel, path: Path, weights: Path | None, *, opset: int = DEFAULT_OPSET
) -> None:
    """Write a model in the form for ONNX Runtime's CPU provider, if it has one of its own.

    Args:
        model: its LRN layers are replaced.
        path: where to write; nothing is written for a network without LRN, which needs no other form.
        weights: the file of `export_onnx`, in the same folder: the large weights are read from there. None
            writes them again, so that the file needs no other.
        opset: as in `export_onnx`.
    """
    if use_banded_lrn(model.network):
        export_onnx(model, path, opset=opset)
        if weights is not None:
            share_weights(path, weights)


def export_for_int8_cpu(model: ContractModel, path: Path, *, opset: int = DEFAULT_OPSET) -> list[float]:
    """Write the float32 model that `infer.export.quantize.quantize_for_cpu` starts from.

    Args:
        model: its LRN layers and its normalisation are replaced.
        path, opset: as in `export_onnx`.
    Returns:
        The exponent beta of each LRN.
    """
    betas = use_banded_lrn(model.network, channels_last=True)
    model.normalize = fold_normalization(model.network, model.checkpoint.preprocessing)
    export_onnx(model, path, opset=opset)
    return betas


def export_onnx(model: ContractModel, path: Path, *, opset: int = DEFAULT_OPSET) -> None:
    """Write a model as one ONNX file, weights included.

    LRN is written as ONNX's own operator, which TensorRT maps to its LRN layer. The file's metadata carries
    the class labels, the preprocessing and the checkpoint's hash; nothing in it names this machine.

    Args:
        model: of a verified checkpoint, in fp32 or fp16; int8 starts from fp32, see `infer.export.quantize`.
        path: where to write; its folder exists.
        opset: as in `infer.export.options.OnnxOptions`; the file has the lowest IR version with the opset.
    Raises:
        UserError: a model too large for one file.
    """
    checkpoint = model.checkpoint
    size_bytes = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size_bytes > MAX_ONNX_BYTES:
        raise UserError(f"the weights take {size_bytes / 2**30:.1f} GiB, and an ONNX file holds at most 2")
    crop_px = checkpoint.preprocessing.crop_px
    example_NHWC = torch.zeros(2, crop_px, crop_px, 3, dtype=torch.uint8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = torch.onnx.export(
            model.eval(),
            (example_NHWC,),
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME] if model.features is None else [OUTPUT_NAME, model.features],
            opset_version=max(opset, EXPORTER_MIN_OPSET),
            dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}},
            dynamo=True,
            verbose=False,
        )
    for warning in caught:
        if not issubclass(warning.category, _QUIET):
            log.warning("ONNX export: %s", " ".join(str(warning.message).split()))
    assert program is not None
    proto = program.model_proto
    if opset < EXPORTER_MIN_OPSET:
        proto = lower_opset(proto, opset)
    strip_notes(proto)
    declare_least(proto)
    proto.producer_name, proto.producer_version = "alexnet", version("alexnet")
    proto.doc_string = (
        f"AlexNet ({checkpoint.config.model.description}) for {len(checkpoint.classes)} classes: "
        f"uint8 RGB images of {crop_px}x{crop_px} pixels, NHWC, to probabilities"
        f"{'' if model.features is None else f' and features of {model.features}'}"
    )
    metadata = {
        "model": checkpoint.config.model.description,
        "recipe": checkpoint.config.recipe,
        "step": str(checkpoint.step),
        "classes": msgspec.json.encode(tuple(map(printable, checkpoint.classes))).decode(),
        "labels": msgspec.json.encode(tuple(map(printable, checkpoint.class_labels))).decode(),
        "preprocessing": msgspec.json.encode(checkpoint.preprocessing).decode(),
        "checkpoint_sha256": checkpoint.sha256,
    }
    onnx.helper.set_model_props(proto, metadata)
    onnx.save(proto, path)
    onnx.checker.check_model(path, full_check=True)


def lower_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """Convert a model of opset 18 to an older one.

    ONNX's converter knows no way back for `Pad`, which has a fourth input since opset 18 and is otherwise the
    same. It leaves operators of foreign domains alone, so a `Pad` of three inputs passes as one of those.
    """
    hidden = "unchanged"
    model.opset_import.add(domain=hidden, version=1)
    for node in model.graph.node:
        if node.op_type == "Pad" and len(node.input) <= 3:
            node.domain = hidden
    lowered: onnx.ModelProto = onnx.version_converter.convert_version(model, opset)
    for node in lowered.graph.node:
        if node.domain == hidden:
            node.domain = ""
    return lowered


def declare_least(model: onnx.ModelProto) -> None:
    """Declare no more than the model needs: older runtimes refuse a higher IR version or operator set unread.

    That is the lowest IR version with its opset, and no sets of which it uses no operator, as quantisers add.
    """
    used = {node.domain for node in model.graph.node}
    needed = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(needed)
    model.ir_version = onnx.helper.find_min_ir_version_for(needed)


def strip_notes(model: onnx.ModelProto) -> None:
    """Remove the notes of an exporter or quantiser, such as stack traces with this machine's paths."""
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info, *graph.initializer)
    for part in (model, graph, *graph.node, *values):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
