"""Finds a network's weights in what another trainer saved: nested in entries, under longer names.

| wrapping | from |
|---|---|
| `module.…`, `features.module.…` | DistributedDataParallel, DataParallel |
| `_orig_mod.…` | `torch.compile` |
| `_fsdp_wrapped_module.…`, `_checkpoint_wrapped_module.…` | FSDP, activation checkpointing |
| `{"model": …, "args": …}` | torchvision's references |
| `{"state_dict": …}` | pytorch/examples (`.pth.tar`), timm, Lightning (`.ckpt`, with `model.…`) |
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from data_pipeline.common.text import visible
from train.checkpoints.safe_load import Skipped

WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Modules that hold one other module and no weights of their own."""
PARTS = ("features", "classifier")
"""The parts of an AlexNet that have weights, in torchvision's and in ours."""
MAX_DEPTH = 4
"""Entries inside entries that are searched: trainers nest one or two."""
_AVERAGES = ("ema", "avg", "average", "averaged", "swa")
_MAX_WORDS = 16
"""A name is split into so many; real ones have six."""
_SHOWN = 60


@dataclass(frozen=True)
class FoundWeights:
    """A state dict of torchvision's names, and how it was wrapped.

    Attributes:
        weights: by name; a value that is no tensor is a `Skipped` or of another plain type.
        wrapping: what was taken off and passed over, in words; empty for a bare state dict.
    """

    weights: dict[str, Any]
    wrapping: str = ""


@dataclass
class _Network:
    """The weights of one network: where they lie, their prefix, and what was taken out of their names."""

    entry: str
    prefix: str
    wrappers: set[str] = field(default_factory=set)
    weights: dict[str, Any] = field(default_factory=dict)
    num_others: int = 0

    @property
    def words(self) -> list[str]:
        """Its wrapping in words: the entries that lead to it, and what its names have in front or inside."""
        taken_off = ([self.prefix] if self.prefix else []) + sorted(self.wrappers)
        words = [f"in {self.entry}"] if self.entry else []
        return [*words, f"names without {', '.join(map(_quoted, taken_off))}"] if taken_off else words

    @property
    def is_average(self) -> bool:
        words = f"{self.entry}.{self.prefix}".lower().replace('"', ".").replace("_", ".").split(".")
        return any(word in _AVERAGES for word in words)


def find_weights(content: Any) -> FoundWeights:
    """Find the weights of one network in the content of a file.

    Of several, the first one that is no moving average is taken, and the others are named.

    Args:
        content: as `train.checkpoints.safe_load.load_plain` returns it, with foreign objects skipped.
    Returns:
        The weights under torchvision's names; where nothing looks like a network of ours, the mapping with
        the most tensors as it is, so that what is wrong with it can be said.
    Raises:
        ValueError: there are none, or one name twice; says why.
    """
    mappings = list(_mappings(content))
    found = [network for entry, mapping in mappings for network in _networks(entry, mapping)]
    if not found:
        num_tensors = [sum(isinstance(v, Tensor) for v in dict.values(m)) for _, m in mappings]
        if not any(num_tensors):
            raise ValueError(_why_no_tensors(content))
        return FoundWeights(dict(mappings[num_tensors.index(max(num_tensors))][1]))
    chosen = next((network for network in found if not network.is_average), found[0])
    words = chosen.words
    if chosen.num_others:
        words.append(f"{chosen.num_others} other entries beside them not taken")
    others = [" ".join(network.words) or "bare" for network in found if network is not chosen]
    if others:
        words.append(f"not those of another network ({'; '.join(others[:3])})")
    skipped = list(dict.fromkeys(_skipped_names(content)))
    if skipped:
        more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
        words.append(f"skipped without running it: {', '.join(skipped[:3])}{more}")
    return FoundWeights(chosen.weights, "; ".join(words))


def _mappings(content: Any) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Every mapping with names as keys, from the outside in, each once, with the entries that lead to it."""
    seen, waiting = set[int](), deque([("", content, 0)])
    while waiting:
        entry, value, depth = waiting.popleft()
        if not isinstance(value, dict) or id(value) in seen:
            continue
        seen.add(id(value))
        yield entry, value
        for key, inner in dict.items(value) if depth < MAX_DEPTH else ():
            if isinstance(key, str) and isinstance(inner, dict):
                waiting.append((f"{entry}/{_quoted(key)}" if entry else _quoted(key), inner, depth + 1))


def _networks(entry: str, mapping: dict[Any, Any]) -> list[_Network]:
    """The networks whose weights lie in one mapping: a prefix with all `PARTS` under it is one."""
    found: dict[str, _Network] = {}
    for key, value in dict.items(mapping):
        if not isinstance(key, str) or not isinstance(value, (Tensor, Skipped)):
            continue
        words = key.split(".", _MAX_WORDS)
        start = next((place for place, word in enumerate(words) if word in PARTS), None)
        if start is None:
            continue
        prefix = "".join(f"{word}." for word in words[:start] if word not in WRAPPERS)
        name = ".".join(word for word in words[start:] if word not in WRAPPERS)
        network = found.setdefault(prefix, _Network(entry, prefix))
        if name in network.weights:
            raise ValueError(f"it has {_quoted(name)} twice, bare and wrapped")
        network.weights[name] = value
        network.wrappers.update(
            f"{before}.{word}." if before in PARTS else f"{word}."
            for before, word in pairwise(["", *words])
            if word in WRAPPERS
        )
    whole = [one for one in found.values() if {name.partition(".")[0] for name in one.weights} == set(PARTS)]
    for network in whole:
        network.num_others = len(mapping) - sum(len(one.weights) for one in whole)
    return whole


def _skipped_names(content: Any) -> Iterator[str]:
    """The classes that were skipped in the entries of a file."""
    for _, mapping in _mappings(content):
        yield from (visible(v.name)[:_SHOWN] for v in dict.values(mapping) if isinstance(v, Skipped))


def _why_no_tensors(content: Any) -> str:
    models = [content.name] if isinstance(content, Skipped) else list(_skipped_names(content))
    if models:
        return (
            f"it holds {visible(models[0])[:_SHOWN]} as an object, which only its own code can load: save "
            "model.state_dict() there, and convert that"
        )
    return "it holds none"


def _quoted(name: str) -> str:
    return f'"{visible(name)[:_SHOWN]}"'
