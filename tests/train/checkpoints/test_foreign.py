"""Weights as other trainers wrap them: the network's tensors are found, and what was taken off is named."""

from __future__ import annotations

import argparse
import builtins
import importlib
import os
import random
import subprocess
import zipfile
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipeline.common.errors import CorruptFileError
from train.checkpoints.foreign import find_weights
from train.checkpoints.safe_load import MAX_FOREIGN_NAMES, Skipped, load_plain

State = dict[str, Tensor]


@pytest.fixture
def state() -> State:
    """Three tensors under torchvision's names."""
    return {
        "features.0.weight": torch.arange(4.0),
        "classifier.6.weight": torch.ones(2, 3),
        "classifier.6.bias": torch.zeros(2),
    }


def put(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def parallel_features(state: State) -> State:
    """As pytorch/examples wraps AlexNet: the features alone are in DataParallel."""
    return {name.replace("features.", "features.module."): value for name, value in state.items()}


class AttributeDict(dict[str, Any]):
    """As Lightning kept hyperparameters."""


class Made:
    """A class of the trainer's, whose construction would be noticed."""

    constructed: ClassVar[list[str]] = []

    def __setstate__(self, state: object) -> None:
        self.constructed.append("state")

    def __reduce__(self) -> Any:
        return make, ("argument",), {"a": 1}


def make(text: str) -> Made:
    Made.constructed.append(text)
    return Made()


ARGS = argparse.Namespace(lr=0.01, device="cuda", nested=SimpleNamespace(path=Path("/data")))


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda s: s, ""),
        (OrderedDict, ""),
        (lambda s: put(s, "module."), 'names without "module."'),
        (lambda s: put(s, "_orig_mod."), 'names without "_orig_mod."'),
        (lambda s: put(s, "_orig_mod.module."), 'names without "_orig_mod.", "module."'),
        (parallel_features, 'names without "features.module."'),
        (lambda s: {"model": s, "epoch": 3, "args": ARGS},
         'in "model"; skipped without running it: argparse.Namespace'),
        (lambda s: {"arch": "alexnet", "state_dict": parallel_features(s), "best_acc1": torch.tensor(56.5)},
         'in "state_dict"; names without "features.module."'),
        (lambda s: {"state_dict": put(s, "model._orig_mod."), "hyper_parameters": AttributeDict(lr=0.1)},
         'in "state_dict"; names without "model.", "_orig_mod."'),
        (lambda s: {"state_dict": {**put(s, "net."), "loss.weight": torch.ones(2)}},
         'in "state_dict"; names without "net."; 1 other entries beside them not taken'),
        (lambda s: {"model": put(s, "module."), "model_ema": put(s, "module.")},
         'in "model"; names without "module."; not those of another network '
         '(in "model_ema" names without "module.")'),
        (lambda s: {"state_dict_ema": put(s, ""), "state_dict": s},
         'in "state_dict"; not those of another network (in "state_dict_ema")'),
        (lambda s: {"state": {"model": AttributeDict(s)}, "rng": {"python": (3, (1, 2), None)}},
         'in "state"/"model"'),
        (lambda s: {"model": s, "scores": defaultdict(list, a=[1]), "last": deque([1.0, 2.0], maxlen=3)},
         'in "model"'),
        (lambda s: {"model": s, "best": np.float64(0.5), "curve": np.arange(3)},
         'in "model"; skipped without running it: numpy._core.multiarray.scalar, '
         "numpy._core.multiarray._reconstruct"),
        (lambda s: {"model": s, "hook": Made()},
         'in "model"; skipped without running it: tests.train.checkpoints.test_foreign.make'),
    ],
)  # fmt: skip
def test_wrapped_weights_are_found_and_named(
    wrap: Callable[[State], Any], said: str, state: State, tmp_path: Path
) -> None:
    torch.save(wrap(state), tmp_path / "w.pth")
    found = find_weights(load_plain(tmp_path / "w.pth", skipping=True))
    assert found.wrapping == said
    assert found.weights.keys() == state.keys()
    assert all(torch.equal(found.weights[name], value) for name, value in state.items())
    assert Made.constructed == []


def test_moving_average_is_not_taken_for_the_weights(state: State) -> None:
    average = {name: value + 1 for name, value in state.items()}
    for wrapped in (
        {"model_ema": average, "model": state},
        {**put(average, "ema_model.module."), **put(state, "model.")},
    ):
        found = find_weights(wrapped)
        assert torch.equal(found.weights["classifier.6.bias"], state["classifier.6.bias"])
    assert torch.equal(find_weights({"ema": average}).weights["classifier.6.bias"], torch.ones(2))


def test_file_of_torch_before_archives_is_unwrapped(state: State, tmp_path: Path) -> None:
    wrapped = {"state_dict": put(state, "module."), "optimizer": {"state": {0: {"x": torch.ones(9)}}}}
    torch.save(wrapped, tmp_path / "old.pth.tar", _use_new_zipfile_serialization=False)
    found = find_weights(load_plain(tmp_path / "old.pth.tar", skipping=True))
    assert (list(found.weights), found.wrapping) == (list(state), 'in "state_dict"; names without "module."')


def test_whole_model_is_named_as_what_cannot_be_loaded(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3), tmp_path / "whole.pth")
    content = load_plain(tmp_path / "whole.pth", skipping=True)
    assert isinstance(content, Skipped)
    with pytest.raises(
        ValueError, match=r"holds torch\.nn\.modules\.linear\.Linear as an object, .* save model\.state_dict"
    ):
        find_weights(content)
    with pytest.raises(ValueError, match="it holds none"):
        find_weights({"epoch": 3, "list": [torch.ones(3)]})
    twice = {"features.0.weight": torch.ones(1), "features.module.0.weight": torch.ones(1)}
    with pytest.raises(ValueError, match=r'"features\.0\.weight" twice, bare and wrapped'):
        find_weights(twice)


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    "function", [os.mkdir, builtins.eval, builtins.open, importlib.import_module, subprocess.check_output]
)
def test_calls_of_an_attack_are_refused_beside_weights(
    function: Callable[..., Any], state: State, tmp_path: Path
) -> None:
    torch.save({"model": state, "args": Call(function, str(tmp_path / "made"))}, tmp_path / "evil.pth")
    with pytest.raises(CorruptFileError, match="holds more than tensors and plain values"):
        load_plain(tmp_path / "evil.pth", skipping=True)
    assert not (tmp_path / "made").exists()


def test_skipping_is_bounded_and_leaves_plain_loading_strict(state: State, tmp_path: Path) -> None:
    path = tmp_path / "args.pth"
    torch.save({"model": state, "args": ARGS}, path)
    assert isinstance(load_plain(path, skipping=True)["args"], Skipped)
    with pytest.raises(CorruptFileError, match="more than tensors and plain values"):
        load_plain(path)  # nothing that was allowed for one file stays allowed
    many = [type(f"T{number}", (), {"__module__": __name__}) for number in range(MAX_FOREIGN_NAMES + 1)]
    globals().update({kind.__name__: kind for kind in many})
    torch.save(many, tmp_path / "many.pth")
    with pytest.raises(CorruptFileError, match=f"names {MAX_FOREIGN_NAMES + 1} classes that are not torch's"):
        load_plain(tmp_path / "many.pth", skipping=True)


def test_damaged_wrappings_are_read_or_refused_in_one_line(state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": put(state, "module."), "args": ARGS, "best": np.float64(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in entries if name.endswith("/data.pkl")]
    generator, refused = random.Random(0), 0
    for _ in range(200):
        content = bytearray(entries[name])
        for _ in range(generator.randint(1, 4)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:
            for other, kept in entries.items():
                archive.writestr(other, bytes(content) if other == name else kept)
        try:
            find_weights(load_plain(path, skipping=True))
        except (CorruptFileError, ValueError) as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
    assert 100 < refused < 200
