"""Export of weights, and their import as a run (`train.pretrained.readers` has what can come in).

Imported weights become a run with one checkpoint, so that they can be evaluated, exported and served like any
other. Nothing in an imported file is executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
import torch

from data_pipeline.common.errors import UserError, raising
from data_pipeline.common.files import writing_to
from data_pipeline.common.text import names_in, printable
from data_pipeline.results.card import InitRecord
from data_pipeline.results.outputs import check_output
from train.checkpoints.format import Pointer, Progress, Snapshot, write_pointer
from train.checkpoints.load import Checkpoint, load_checkpoint, make_model_with
from train.checkpoints.share import encode_weights
from train.checkpoints.write import save_checkpoint
from train.optim.sgd import make_optimizer
from train.pretrained.readers import read_file
from train.runs.card import count_parameters
from train.runs.folder import create_run

_ADVICE = "what can come in is torchvision's `alexnet`, BVLC's as .onnx, or .safetensors as written here"
Target = Literal["safetensors", "torchvision"]


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
        published = msgspec.structs.replace(model, stem_kernel=None, groups=None, norm=None, pool_padding=0)
        if model != published or (model.name, model.hidden_units) != ("owt", 4096):
            raise UserError(
                "torchvision's alexnet is `owt` with 4096 hidden units; this checkpoint is "
                f"`{model.description}` with {model.hidden_units}"
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
    with raising(UserError, f"--classes {printable(path)} cannot be read"):
        return names_in(path.read_bytes(), path)


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
    source = read_file(path)
    if out.exists() and not out.is_dir():
        raise UserError(f"{printable(out)} is a file: name a folder for the new run")
    weights = source.weights
    layers = [name for name, tensor in weights.items() if tensor.ndim == 2]
    if not layers:
        raise UserError(f"{path} holds no fully connected layer, so it is none of our networks")
    num_classes = len(weights[max(layers)])  # fc6, fc7, fc8; or 1, 4, 6
    labels_text = source.labels_text if classes is None else ()
    classes = classes or source.classes or tuple(map(str, range(num_classes)))
    if len(classes) != num_classes:
        raise UserError(f"{path} has {num_classes} classes, and {len(classes)} names were given")
    # How the weights were trained, of which nothing is repeated here.
    config = msgspec.structs.replace(source.config, init_from=None, freeze="none", head_rate=1.0)
    model = make_model_with(config, weights, num_classes, path, _ADVICE)
    record = InitRecord(source=source.description, sha256=source.sha256, loaded=tuple(sorted(weights)))
    optimizer, folder = make_optimizer(model, config.optimizer), create_run(out, config)
    saved = save_checkpoint(
        folder.checkpoints,
        Snapshot(
            step=0,
            epoch=0,
            samples_seen=0,
            config=config,
            classes=classes,
            states={"model": model.state_dict(), "optimizer": optimizer.state_dict()},
            progress=Progress(init=record),
            labels_text=labels_text,
        ),
    )
    write_pointer(folder.checkpoints, "best", Pointer(step=0, top1=None))
    write_pointer(folder.checkpoints, "last", Pointer(step=0, top1=None))
    return saved


def inspect_checkpoint(folder: Path) -> dict[str, Any]:
    """Verify a checkpoint and describe it as plain values."""
    checkpoint = load_checkpoint(folder)
    return {
        "folder": str(folder),
        **{name: getattr(checkpoint, name) for name in ("sha256", "step", "epoch", "samples_seen")},
        "changes": msgspec.to_builtins(checkpoint.progress.changes),
        "init": msgspec.to_builtins(checkpoint.progress.init),
        "recipe": checkpoint.config.recipe,
        "model": checkpoint.config.model.description,
        "weights": checkpoint.weights_name,
        "parameters": count_parameters(checkpoint),
        "classes": len(checkpoint.classes),
        "crop_px": checkpoint.preprocessing.crop_px,
        "metrics": checkpoint.metrics,
    }
