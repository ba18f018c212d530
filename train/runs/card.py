"""The model card: what was trained, on what, how, and how well; for a run, and as a part of a bundle's."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from data_pipeline.common.errors import CorruptFileError, SaveError, UserError
from data_pipeline.common.files import write_atomic
from data_pipeline.common.text import printable
from data_pipeline.results.card import (
    CARD_NAME,
    WEIGHTS_NAME,
    code,
    codes,
    front_matter,
    licence_section,
    named_accuracies,
    table,
)
from data_pipeline.transforms.preprocessing import describe_preprocessing
from train.checkpoints.format import Pointer, read_pointer
from train.checkpoints.load import Checkpoint, load_checkpoint
from train.checkpoints.retention import step_folder
from train.checkpoints.share import encode_weights, without_places
from train.config.load import make_config, recipe_names
from train.config.schema import RunConfig
from train.runs.changes import differing_values
from train.runs.folder import MetricsRow, RunFolder

log = logging.getLogger("train")

NETWORKS = {
    "paper": "the network of Krizhevsky et al. 2012 as one tower with groups",
    "caffe": "BVLC's reference network",
    "owt": 'the "one weird trick" network of Krizhevsky 2014, torchvision\'s `alexnet`',
    "bn": "the network of Krizhevsky et al. 2012 with batch normalisation in place of its local response one",
}
"""Descriptions of `model.name`, for a reader who knows the papers."""
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def share_best(run: Path, best: Pointer | None) -> None:
    """Write `README.md` and `model.safetensors` of a run's best checkpoint into the run's folder.

    The run is finished and saved: whatever goes wrong here is one line, and no error.

    Args:
        run: the run's folder.
        best: its best checkpoint, if any was saved.
    """
    try:
        if best is None:
            raise SaveError("no checkpoint was saved")
        checkpoint = load_checkpoint(step_folder(run / "checkpoints", best.step))
        write_atomic(run / WEIGHTS_NAME, encode_weights(checkpoint, without_places(checkpoint.config)))
        write_atomic(run / CARD_NAME, run_card(checkpoint).encode())
    except (OSError, CorruptFileError, SaveError, UserError) as error:
        reason = getattr(error, "strerror", None) or error
        log.warning(f"{run}: {CARD_NAME} and {WEIGHTS_NAME} are not written: {reason}")


def run_card(checkpoint: Checkpoint) -> str:
    """The card of a run, of its best checkpoint, in Markdown."""
    data, crop_px = data_name(checkpoint.config), checkpoint.preprocessing.crop_px
    return "\n\n".join(
        [
            front_matter(checkpoint.config.recipe, data, named_accuracies(checkpoint.metrics)).rstrip(),
            f"# AlexNet `{checkpoint.config.model.name}`, recipe {code(checkpoint.config.recipe)}",
            *training_sections(checkpoint),
            f"## Preprocessing\n\n{describe_preprocessing(checkpoint.preprocessing)}",
            f"## Use\n\n`{WEIGHTS_NAME}` holds the weights under the names of the network in "
            "`train/models/alexnet.py`, for normalised float images of shape (N, 3, "
            f"{crop_px}, {crop_px}); its metadata have configuration and classes. With alexnet, where `RUN` "
            "is this folder and `DATA` the data:\n\n"
            "```\n"
            "alexnet evaluate RUN --data DATA\n"
            "alexnet export RUN --data DATA\n"
            "torchrun --nproc_per_node=2 -m train.main --recipe RUN/config.json --data DATA --resume RUN\n"
            "```\n\n"
            "The last line resumes training, on any number of ranks; `--set epochs=N` trains for longer. The "
            "second writes a bundle, whose card says how to load it with plain ONNX Runtime.",
            licence_section(data),
        ]
    ) + "\n"  # fmt: skip


def training_sections(checkpoint: Checkpoint) -> list[str]:
    """Write a card's paragraphs and sections about training: network, data, recipe, results."""
    model = checkpoint.config.model
    changes = model.description.removeprefix(model.name).strip(" ()")
    changed = f", changed ({code(changes)})" if changes else ""
    return [
        f"AlexNet, {NETWORKS[model.name]}{changed}: {count_parameters(checkpoint):,} parameters, "
        f"{len(checkpoint.classes):,} classes, images of {checkpoint.preprocessing.crop_px} pixels.",
        f"## Data\n\n{_data_text(checkpoint)}",
        f"## Recipe\n\n{_recipe_text(checkpoint)}",
        f"## Results\n\n{_results_text(checkpoint)}",
    ]


def count_parameters(checkpoint: Checkpoint) -> int:
    """Count the numbers that training has learnt: without the running statistics of batch normalisation."""
    named = checkpoint.weights.items()
    return sum(tensor.numel() for name, tensor in named if not name.endswith(_BUFFERS))


def data_name(config: RunConfig) -> str:
    """The name of the data folder, without the place where it lay; empty where there was none."""
    return printable(Path(config.data.root).name) if config.data.root else ""


def _data_text(checkpoint: Checkpoint) -> str:
    data = data_name(checkpoint.config)
    if not checkpoint.data:
        return "The weights were imported; their publisher says what they were trained on."
    counts = [
        f"{found.num_samples:,} {words} images"
        + (f" ({found.num_quarantined:,} more are left out as unreadable)" if found.num_quarantined else "")
        for split, words in (("train", "training"), ("val", "validation"))
        if (found := checkpoint.data.get(split)) is not None
    ]
    return (
        f"{code(data)}: {' and '.join(counts)} of {len(checkpoint.classes):,} classes: "
        f"{codes(checkpoint.class_labels)}."
    )


def _recipe_text(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    if not checkpoint.data:
        return f"{code(config.recipe)}: how imported weights were trained is not known here."
    known = config.recipe in recipe_names()
    base = make_config(config.recipe) if known else RunConfig(recipe=config.recipe)
    before, now = (msgspec.to_builtins(without_places(value)) for value in (base, config))
    rows = [
        (f"`{key}`", code(_shown(value), in_table=True), code(_shown(usual), in_table=True))
        for name in RunConfig.__struct_fields__
        for key, usual, value in differing_values(name, before[name], now[name])
    ]
    other = "the recipe's" if known else "the defaults"
    origin = "as it ships with alexnet" if known else "which does not ship with alexnet"
    text = (
        f"{code(config.recipe)}, {origin}, for {config.epochs} epoch(s) in batches of {config.global_batch}"
    )
    if not rows:
        return f"{text}. Every setting is {other}."
    return f"{text}. Settings that differ from {other}:\n\n" + table(("setting", "here", other), rows)


def _shown(value: object) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def _results_text(checkpoint: Checkpoint) -> str:
    found = named_accuracies(checkpoint.metrics)
    if not found:
        return f"The checkpoint of step {checkpoint.step:,} was not evaluated."
    row, config = _row_of(checkpoint), checkpoint.config
    if row is not None:
        of = f"{row.samples:,} validation images"
        of += f" ({row.failed:,} more could not be read)" if row.failed else ""
    else:
        val = checkpoint.data.get("val")
        of = f"{val.num_samples:,} validation images" if val is not None else "the validation images"
    rows = [(name, f"{value:.2%}", of) for name, value in found.items()]
    if "loss" in checkpoint.metrics:
        rows.append(("loss", f"{checkpoint.metrics['loss']:.4f}", of))
    average = f"the average of the weights (`ema_decay` {config.ema_decay:g})"
    return (
        f"{table(('', 'value', 'of'), rows)}\n\n"
        f"Epoch {checkpoint.epoch:,} of {config.epochs:,}, step {checkpoint.step:,}; {_chosen(checkpoint)}. "
        f"Computed with {average if checkpoint.average_state else 'the weights of that step'}, on "
        f"{'the mean of ten views of each image' if config.ten_crop else 'the centre of each image'}."
    )


def _row_of(checkpoint: Checkpoint) -> MetricsRow | None:
    """The row of the checkpoint's evaluation in its run's `metrics.jsonl`, which has the counts."""
    try:
        rows = RunFolder(checkpoint.run_folder).rows()
    except OSError:
        return None
    return next((row for row in reversed(rows) if (row.split, row.step) == ("val", checkpoint.step)), None)


def _chosen(checkpoint: Checkpoint) -> str:
    try:
        best = read_pointer(checkpoint.folder.parent / "best.json").step == checkpoint.step
    except (OSError, CorruptFileError):
        best = False
    if best:
        return "of all epochs the one with the highest top-1 on these same images, which flatters it a little"
    return "chosen by name, and not by its accuracy"
