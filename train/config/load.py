"""The run configuration: a tree of frozen values, and how recipes and `--set` fill it.

Order: defaults < recipe < `--set dotted.key=value`. An unknown key is an error that names the nearest one; a
value out of range says what is allowed. What can be derived from a value (steps per epoch, rank batch) is
not in here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from data_pipeline.common.errors import UserError
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.preprocessing import Preprocessing
from train.config.schema import (
    BelowOne,
    Count,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    Positive,
    ScheduleConfig,
    Table,
)

Factor = Annotated[float, msgspec.Meta(gt=1)]

READERS = 4
"""Most processes that read for a GPU, unless `data.readers` says otherwise."""


class RunConfig(Table, frozen=True):
    """Everything that decides a run's result.

    Args:
        recipe: the recipe's name, for the run folder and the records.
        seed: of the data order, the augmentations, the initial weights and the dropout masks.
        epochs: passes over the training split.
        global_batch: samples an optimiser step uses, over all ranks and accumulation steps.
        micro_batch: most samples that one rank takes through the network at once; None for no limit.
            Accumulation follows from it.
        precision: `auto` is bfloat16 where the hardware has it, else float16 on a GPU and float32 on a CPU.
        device: `auto` is CUDA where there is a GPU.
        cpu_threads: compute threads a rank on a CPU; 0 shares the cores among the ranks of a machine.
        timeout_s: a rank that keeps the others waiting in a collective for longer ends the run.
        parallel: `ddp` gives every rank the whole network; `hybrid` splits the fully connected layers over
            the ranks, so that less travels (`train.distributed.hybrid`).
        compress: how gradients travel under plain ddp: `bf16` rounds them on their way; `powersgd` sends two
            thin matrices a layer, and remembers what they left out (`train.distributed.compression`).
        powersgd_rank: of those matrices; more is nearer, and more bytes.
        powersgd_start: as many first steps of a run send whole gradients.
        lrn: `fused` compiles local response normalisation, `eager` does not; `auto` does in runs long enough.
        compile: compile the network's passes as a whole where that is measured to be faster, at the start.
        log_every: optimiser steps between training rows.
        log_noise_scale: training rows tell the gradient noise scale as well, see `noise_scale`; needs a
            batch in parts, of several ranks or of `micro_batch`.
        checkpoint_every: optimiser steps between checkpoints inside an epoch; None saves at its end only.
        max_skipped: as many steps in a row whose gradient is not finite end the run; each one is skipped.
        spike_factor: skip a step, too, whose gradient's norm is more than so many times its running mean;
            None for no such check.
        flat_loss_grace: a training loss that sits at ln(classes) for so many steps ends the run, see
            `train.health.flat_loss`; 0 turns that off.
        label_smoothing: share of a label that is spread over all classes, 0..1; the training loss has it in.
        ema_decay: keep a running average of the weights, which is evaluated and exported in place of the last
            ones (`train.optim.ema`); 0 keeps none.
        ten_crop: judge each validation image by the mean of ten views, as the paper, not by the centre alone.
        keep_checkpoints: how many of the newest checkpoints stay; the best one always does.
        keep_every: the first checkpoint at or after each multiple of so many steps stays as well.
    """

    recipe: str = "custom"
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0
    epochs: Positive = 90
    global_batch: Positive = 128
    micro_batch: Positive | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    cpu_threads: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    timeout_s: Annotated[float, msgspec.Meta(ge=1, le=86400)] = 600.0
    parallel: Literal["ddp", "hybrid"] = "ddp"
    compress: Literal["none", "bf16", "powersgd"] = "none"
    powersgd_rank: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    powersgd_start: Annotated[int, msgspec.Meta(ge=2)] = 1000
    lrn: Literal["auto", "fused", "eager"] = "auto"
    compile: bool = False
    log_every: Positive = 20
    log_noise_scale: bool = False
    checkpoint_every: Positive | None = None
    keep_checkpoints: Positive = 2
    keep_every: Positive | None = None
    max_skipped: Positive = 10
    spike_factor: Factor | None = None
    flat_loss_grace: Count = 10_000
    label_smoothing: BelowOne = 0.0
    ema_decay: BelowOne = 0.0
    ten_crop: bool = False
    data: DataConfig = DataConfig()
    preprocessing: Preprocessing = Preprocessing()
    augment: Augment = Augment()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[^/\0.][^/\0]{0,99}", self.recipe):
            raise ValueError(
                f"recipe {self.recipe[:100]!r} names a run's folder: 1 to 100 characters, no / and no . first"
            )
        if self.compress == "powersgd" and self.log_noise_scale:
            raise ValueError(
                "log_noise_scale compares parts of a gradient with their sum, which compress=powersgd "
                "changes: use compress=bf16 or none"
            )
        if self.parallel != "hybrid":
            return
        if self.compress != "none":
            raise ValueError(
                f"compress={self.compress} is for plain ddp: parallel=hybrid sends no gradients of the large "
                "layers; choose one"
            )
        if self.compile:
            raise ValueError(
                "compile=true compiles the network as a whole, and parallel=hybrid splits it: choose one"
            )
        if self.optimizer.name == "lars":
            raise ValueError(
                "lars needs the norm of each whole layer, of which parallel=hybrid leaves a rank a part; and "
                "with batches as large as lars is for, ddp sends less (docs/scaling.md): use parallel=ddp"
            )
        if self.log_noise_scale:
            raise ValueError(
                "log_noise_scale compares each rank's own gradients, and under parallel=hybrid no rank has "
                "one of the fully connected layers: use parallel=ddp"
            )


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    folder = resources.files("train.recipes")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name_or_path: str) -> dict[str, Any]:
    """Read a recipe as nested plain values.

    Args:
        name_or_path: a name from `recipe_names`, the path of a TOML file, or a run's `config.json`.
    Raises:
        UserError: no such recipe (the nearest is named), or a file that cannot be parsed (with its line).
    """
    path = Path(name_or_path)
    if path.suffix in (".toml", ".json"):
        if not path.is_file():
            raise UserError(f"recipe file {path} does not exist")
        text, name = path.read_bytes(), path.stem
    else:
        name = name_or_path
        if name not in recipe_names():
            raise UserError(f"unknown recipe {name!r}{_nearest(name, recipe_names())}")
        text = (resources.files("train.recipes") / f"{name}.toml").read_bytes()
    try:
        values = msgspec.json.decode(text) if path.suffix == ".json" else msgspec.toml.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {name_or_path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {name_or_path} is not a table of keys")
    return {"recipe": name, **values}


def make_config(recipe: str, overrides: Iterable[str] = (), data: Path | None = None) -> RunConfig:
    """The resolved configuration of a run.

    Args:
        recipe: name or file of a recipe.
        overrides: `dotted.key=value` texts, values in TOML; a bare word counts as a string.
        data: the data folder, in place of `data.root`.
    Raises:
        UserError: an unknown key (the nearest is named) or a value that is not allowed (what is, is said).

    >>> make_config("tiny-imagenet", ["schedule.learning_rate=0.02"]).schedule.learning_rate
    0.02
    """
    values = load_recipe(recipe)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set takes dotted.key=value, not {override!r}")
        *parents, last = key.strip().split(".")
        table = values
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {override}: {parent!r} is a value, not a table of keys")
        table[last] = _parse_value(text.strip())
    if data is not None:
        values.setdefault("data", {})["root"] = str(data)
    return decode_config(values)


def decode_config(values: Mapping[str, Any]) -> RunConfig:
    """Check nested plain values against the schema; see `make_config` for the errors."""
    _check_keys(values, RunConfig, prefix="")
    try:
        return msgspec.convert(values, RunConfig)
    except msgspec.ValidationError as error:
        raise UserError(f"configuration: {_readable(error)}") from error


def to_json(config: RunConfig) -> str:
    """A configuration as readable JSON; as a `.json` file it is a recipe."""
    return msgspec.json.format(msgspec.json.encode(config)).decode()


def _parse_value(text: str) -> Any:
    try:
        return msgspec.toml.decode(f"value = {text}")["value"]
    except msgspec.DecodeError:
        if re.fullmatch(r"[A-Za-z0-9_./~@:+-]+", text):
            return text
        raise UserError(f"--set: {text!r} is not a TOML value; quote strings") from None


def _check_keys(values: Mapping[str, Any], schema: type[Any], prefix: str) -> None:
    fields = get_type_hints(schema)
    for key, value in values.items():
        if key not in fields:
            every = [f"{prefix}{name}" for name in fields]
            shown = (prefix + str(key))[:100]  # it may come from a stranger's checkpoint
            raise UserError(f"unknown key {shown!r}{_nearest(shown, every, _all_keys(RunConfig))}")
        inner = fields[key]
        if isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            if not isinstance(value, Mapping):
                raise UserError(f"key {prefix + key!r} is a table; set one of its keys, e.g. {prefix}{key}.…")
            _check_keys(value, inner, f"{prefix}{key}.")


def _all_keys(schema: type[Any], prefix: str = "") -> list[str]:
    keys = []
    for name, kind in get_type_hints(schema).items():
        nested = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
        keys += _all_keys(kind, f"{prefix}{name}.") if nested else [f"{prefix}{name}"]
    return keys


def _nearest(name: str, candidates: list[str], others: list[str] | None = None) -> str:
    """`; did you mean …?` with the closest candidate, or the list of what there is."""
    for pool in (candidates, others or []):
        close = difflib.get_close_matches(name, pool, n=1, cutoff=0.6)
        # A key given without its table, or in the wrong one, is recognised by its last part.
        last = [c for c in pool if c.split(".")[-1] == name.split(".")[-1]]
        if last or close:
            return f"; did you mean {(last or close)[0]!r}?"
    return f"; there are: {', '.join(candidates)}"


def _readable(error: msgspec.ValidationError) -> str:
    """msgspec's `Expected … - at `$.schedule.kind`` with the key first, and a Literal's values listed."""
    text, _, where = str(error).rpartition(" - at `$.")
    key = where.rstrip("`")
    if not text:
        return str(error)
    kind: Any = RunConfig
    for part in key.split("."):
        part = re.sub(r"\[.*", "", part)
        kind = get_type_hints(kind).get(part) if isinstance(kind, type) else None
    if get_origin(kind) is Literal:
        text += f"; it is one of {', '.join(map(str, get_args(kind)))}"
    return f"{key}: {text}"
