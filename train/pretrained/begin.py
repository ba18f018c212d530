"""Begins a run with weights from elsewhere: takes over all but a head of other classes, and says so."""

from __future__ import annotations

import logging

from data_pipeline.common.errors import UserError
from data_pipeline.results.card import InitRecord
from train.checkpoints.load import Checkpoint
from train.config.schema import ModelConfig, RunConfig
from train.distributed.world import World
from train.health.nonfinite import all_finite
from train.models.alexnet import AlexNet
from train.models.parts import head_of
from train.pretrained.readers import Source, read_source

log = logging.getLogger("train")

COMPUTED_WITH = {
    "model": [key for key in ModelConfig.__struct_fields__ if key not in ("dropout", "init")],
    "preprocessing": ["crop_px", "mean", "std"],
}
"""Keys, by their tables, that change what given weights compute."""


def begin_with_weights(
    network: AlexNet, config: RunConfig, classes: tuple[str, ...], world: World
) -> InitRecord | None:
    """Load what `init_from` names into a network that the seed has made, the same on every rank.

    Rank 0 reads, and the others get its weights; they wait for a download however long it takes.

    Args:
        network: unsharded, on the rank's device.
        classes: of the training data, in the order of the logits.
    Returns:
        What was loaded; None without `init_from`.
    Raises:
        UserError, CorruptFileError: see `read_source` and `take_over`.
    """
    name = config.init_from
    if name is None:
        return None

    def on_main() -> InitRecord:
        record = take_over(network, config, classes, read_source(name))
        log.info(describe_init(record))
        return record

    record = world.broadcast_object(on_main, slow_work="the reading of init_from")
    world.broadcast(network.state_dict().values(), what="the weights of init_from")
    return record


def take_over(
    network: AlexNet, config: RunConfig, classes: tuple[str, ...], source: Source | Checkpoint
) -> InitRecord:
    """Copy a source's weights into a network; where the head is of other classes, the network keeps its own.

    Args:
        network: as `config` describes it; its weights are the initial ones.
        classes: of the network.
    Raises:
        UserError: another network's weights, or weights that are not finite.
    """
    if source.config.model.name != config.model.name:
        raise UserError(
            f"--init: {source.description} holds a `{source.config.model.name}`, and this recipe trains a "
            f"`{config.model.name}`: use --set model.name={source.config.model.name}, or other weights"
        )
    own, theirs, head = network.state_dict(), source.weights, head_of(network)[0]
    in_head = {name for name in own.keys() | theirs.keys() if name.startswith(f"{head}.")}
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    found = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    odd = sorted(
        name for name in (expected.keys() | found.keys()) - in_head if expected.get(name) != found.get(name)
    )
    if odd:
        raise UserError(
            f"--init: {source.description} holds another network's weights ({len(odd)} tensors differ, first "
            f"{odd[0]}: {expected.get(odd[0], 'nothing')} here, {found.get(odd[0], 'nothing')} there)"
            f"{_advice(config, source.config)}"
        )
    same_shapes = all(expected.get(name) == found.get(name) for name in in_head)
    keeps_head = source.classes == classes and same_shapes
    loaded = {name: tensor for name, tensor in theirs.items() if keeps_head or name not in in_head}
    for name, tensor in loaded.items():
        if tensor.is_floating_point() != own[name].is_floating_point():
            raise UserError(
                f"--init: {source.description} has {name} in {tensor.dtype}, not as a network has it"
            )
    if not all_finite(list(loaded.values())):
        raise UserError(f"--init: {source.description} holds weights that are not finite")
    network.load_state_dict({**own, **loaded})
    num_theirs = next(iter(found.get(f"{head}.bias", ())), 0)
    return InitRecord(
        source=source.description,
        sha256=source.sha256,
        loaded=tuple(sorted(loaded)),
        made_anew=tuple(sorted(own.keys() - loaded.keys())),
        unused=tuple(sorted(theirs.keys() - loaded.keys())),
        differences=(
            *([] if keeps_head else [_why_anew(source.classes, classes, num_theirs)]),
            *_differences(config, source.config),
        ),
    )


def describe_init(record: InitRecord) -> str:
    """Format what was loaded, made anew and left unused as one line."""
    parts = [f"{len(record.loaded)} tensors loaded"]
    parts.append(f"made anew: {', '.join(record.made_anew)}" if record.made_anew else "the head among them")
    if record.unused:
        parts.append(f"left unused: {', '.join(record.unused)}")
    return "; ".join([f"init from {record.source}: {', '.join(parts)}", *record.differences])


def _why_anew(theirs: tuple[str, ...] | None, ours: tuple[str, ...], num_theirs: int) -> str:
    if num_theirs != len(ours):
        return f"{num_theirs} classes there, {len(ours)} here"
    if theirs is None:
        return "the source does not name its classes"
    return f"its {len(ours)} classes are others, or in another order"


def _differing_keys(config: RunConfig, source: RunConfig) -> dict[str, tuple[object, object]]:
    """The keys that decide what given weights compute, and whose values differ: here, there."""
    pairs = {
        f"{table}.{key}": (getattr(getattr(config, table), key), getattr(getattr(source, table), key))
        for table, keys in COMPUTED_WITH.items()
        for key in keys
    }
    return {key: (here, there) for key, (here, there) in pairs.items() if here != there}


def _advice(config: RunConfig, source: RunConfig) -> str:
    """Name the settings with which the network would be the source's."""
    sets = [
        f"--set {key}={there}"
        for key, (_, there) in _differing_keys(config, source).items()
        if key not in ("preprocessing.mean", "preprocessing.std")
    ]
    if source.preprocessing.crop_px > config.preprocessing.resize_px:
        sets.append(f"--set preprocessing.resize_px={source.preprocessing.resize_px}")
    return f"; with its sizes they fit: {' '.join(sets)}" if sets else "; train the network that it is"


def _differences(config: RunConfig, source: RunConfig) -> list[str]:
    """Settings under which weights compute something else than in their source; their sizes are the same."""
    return [
        f"{key} was {_shown(there)}, here {_shown(here)}"
        for key, (here, there) in _differing_keys(config, source).items()
        if key != "model.hidden_units"
    ]


def _shown(value: object) -> str:
    return "(" + ", ".join(f"{part:.4g}" for part in value) + ")" if isinstance(value, tuple) else str(value)
