"""Weights from elsewhere: each kind of source, the head of other classes, what is refused, what is frozen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
import torch
from torch import Tensor

from data_pipeline.common.errors import UserError
from data_pipeline.results.card import InitRecord
from tests.helpers.bvlc import bvlc_file
from tests.helpers.checkpoint_samples import CLASSES, save_small_network
from tests.helpers.http_server import serving
from tests.helpers.published import CROP_PX, publish_small
from tests.helpers.ranks import TINY
from tests.helpers.step_samples import parts_of, small_batch, small_trainer
from train.checkpoints.format import Snapshot
from train.checkpoints.load import load_checkpoint
from train.checkpoints.write import save_checkpoint
from train.config.load import make_config
from train.distributed.world import World, open_world
from train.models.alexnet import make_model
from train.pretrained.begin import describe_init
from train.pretrained.published import TORCHVISION_FILE, imagenet_classes
from train.step import train_step
from train.weights import export_weights

OWT = (
    "model.name=owt", "model.hidden_units=8", "model.stem_stride=4",
    f"preprocessing.crop_px={CROP_PX}", "preprocessing.resize_px=72",
)  # fmt: skip


@pytest.fixture
def world() -> Iterator[World]:
    with open_world("cpu") as world:
        yield world


def begin(
    world: World, source: object, *overrides: str, classes: tuple[str, ...] = CLASSES
) -> tuple[InitRecord | None, dict[str, Tensor]]:
    """The record and the weights of a network that begins with a source; with None, by the seed."""
    config = make_config("demo", [*TINY, *overrides], init=None if source is None else str(source))
    parts = parts_of(config, world, classes=classes)
    return parts.init, parts.network.state_dict()


def test_own_runs_and_files_keep_the_head_of_the_same_classes(world: World, tmp_path: Path) -> None:
    torch.manual_seed(5)
    folder, model = save_small_network(tmp_path / "run" / "checkpoints")
    export_weights(load_checkpoint(folder), tmp_path / "w.safetensors", "safetensors")
    for source in (folder, folder / "state.pt", tmp_path / "w.safetensors"):
        record, weights = begin(world, source)
        assert record is not None and (record.made_anew, record.unused, record.differences) == ((), (), ())
        assert set(record.loaded) == weights.keys() == model.state_dict().keys()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert record is not None
    assert describe_init(record).endswith("w.safetensors: 16 tensors loaded, the head among them")


@pytest.mark.parametrize(
    ("classes", "why"),
    [
        (tuple("abcdefg"), "10 classes there, 7 here"),
        (CLASSES[::-1], "its 10 classes are others, or in another order"),
    ],
)
def test_head_of_other_classes_is_made_anew(
    world: World, tmp_path: Path, classes: tuple[str, ...], why: str
) -> None:
    """Its weights are those that the seed gives without a source; nothing else is."""
    torch.manual_seed(5)
    folder, model = save_small_network(tmp_path / "run" / "checkpoints")
    record, weights = begin(world, folder, "preprocessing.mean=[0.4, 0.4, 0.4]", classes=classes)
    _, initial = begin(world, None, classes=classes)
    head = ("classifier.fc8.bias", "classifier.fc8.weight")
    assert record is not None and record.made_anew == record.unused == head
    assert describe_init(record) == (
        f"init from {folder}: 14 tensors loaded, made anew: {', '.join(head)}, "
        f"left unused: {', '.join(head)}; {why}; "
        "preprocessing.mean was (0.5, 0.5, 0.5), here (0.4, 0.4, 0.4)"
    )
    for name, value in weights.items():
        assert torch.equal(value, initial[name] if name in head else model.state_dict()[name]), name
    assert not torch.equal(weights["classifier.fc6.weight"], initial["classifier.fc6.weight"])


def test_average_of_a_run_is_what_is_taken_over(world: World, tmp_path: Path) -> None:
    config = make_config("demo", [*TINY, "ema_decay=0.9"])
    model = make_model(config.model, num_classes=10, crop_px=22)
    average = {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}
    folder = save_checkpoint(
        tmp_path / "run" / "checkpoints",
        Snapshot(
            step=1, epoch=0, samples_seen=64, config=config, classes=CLASSES, metrics={},
            states={"model": model.state_dict(), "average": average},
        ),
    )  # fmt: skip
    record, weights = begin(world, folder, "ema_decay=0.9")
    assert record is not None and "the average of its weights (ema_decay 0.9)" in record.source
    assert all((value == 0.5).all() for value in weights.values())


def test_torchvisions_weights_come_wrapped_bare_and_fetched(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, names = imagenet_classes()
    assert (len(set(ids)), len(set(names)), ids == tuple(sorted(ids))) == (1000, 1000, True)
    assert (TORCHVISION_FILE.sha256[:8], TORCHVISION_FILE.size_bytes) == ("7be5be79", 244_408_911)
    with serving() as server:
        _, theirs = publish_small(server, monkeypatch, tmp_path / "cache")
        record, weights = begin(world, "torchvision", *OWT, classes=ids)
        assert record is not None and (len(record.loaded), record.made_anew, server.asked) == (16, (), [None])
        begin(world, "torchvision", *OWT)
        assert server.asked == [None], "it is in the cache, and verified"
        (tmp_path / "cache/alexnet/weights/alexnet-owt-7be5be79.pth").unlink()
        server.mode = "not found"
        with pytest.raises(
            UserError, match=r"answered 404 .*; fetch it by other means, and name the file with --init"
        ):
            begin(world, "torchvision", *OWT)
    assert all(torch.equal(value, theirs[name]) for name, value in weights.items())
    torch.save({"state_dict": {f"module.{n}": t.half() for n, t in theirs.items()}}, tmp_path / "theirs.pth")
    sizes = (
        "model.name=owt",
        "model.hidden_units=8",
        "preprocessing.crop_px=40",
        "preprocessing.resize_px=40",
    )
    advice = "--set model.stem_stride=4 --set preprocessing.crop_px=64 --set preprocessing.resize_px=72"
    with pytest.raises(
        UserError, match=rf"first classifier.1.weight: .*; with its sizes they fit: {advice}$"
    ):
        begin(world, tmp_path / "theirs.pth", *sizes)
    record, weights = begin(world, tmp_path / "theirs.pth", *OWT, classes=ids)
    assert record is not None and record.made_anew == ("classifier.6.bias", "classifier.6.weight")
    assert "the source does not name its classes" in record.differences
    assert torch.equal(weights["features.0.weight"], theirs["features.0.weight"].half().float())


def test_bvlcs_onnx_is_taken_over_and_its_normalisation_named(world: World, tmp_path: Path) -> None:
    file = bvlc_file()
    generator = np.random.default_rng(0)
    layers = [node for node in file.graph.node if node.op_type in ("Conv", "Gemm")]
    shapes = [
        (96, 3, 11, 11), (256, 48, 5, 5), (384, 256, 3, 3), (384, 192, 3, 3), (256, 192, 3, 3),
        (8, 9216), (8, 8), (10, 8),
    ]  # fmt: skip
    for node, shape in zip(layers, shapes, strict=True):
        for name, size in zip(node.input[1:3], (shape, shape[:1]), strict=True):
            value = generator.normal(0, 0.01, size).astype(np.float32)
            file.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(file, tmp_path / "bvlc.onnx")
    sizes = ("model.name=caffe", "model.hidden_units=8", "model.stem_stride=4",
             "preprocessing.crop_px=227", "preprocessing.resize_px=256")  # fmt: skip
    record, weights = begin(world, tmp_path / "bvlc.onnx", *sizes)
    assert record is not None and len(record.loaded) == 14
    assert "preprocessing.std was (0.003922, 0.003922, 0.003922), here (0.5, 0.5, 0.5)" in record.differences
    first = onnx.numpy_helper.to_array(file.graph.initializer[-16])
    assert np.array_equal(weights["features.conv1.weight"].numpy(), first[:, ::-1])


def test_sources_that_do_not_fit_are_refused_in_one_line(world: World, tmp_path: Path) -> None:
    folder, model = save_small_network(tmp_path / "run" / "checkpoints")

    def refuse(source: object, words: str, *overrides: str) -> None:
        with pytest.raises(UserError, match=words) as raised:
            begin(world, source, *overrides)
        assert "\n" not in str(raised.value)

    refuse(
        folder, "holds a `paper`, and this recipe trains a `bn`: use --set model.name=paper", "model.name=bn"
    )
    refuse(
        folder,
        r"another network's weights \(4 tensors differ, first classifier.fc6.bias: \(32,\) here, \(64,\) "
        r"there\); with its sizes they fit: --set model.hidden_units=64$",
        "model.hidden_units=32",
    )
    refuse(
        tmp_path / "gone", "gone does not exist; name a run, a checkpoint, a file of weights, or torchvision"
    )
    refuse(tmp_path, "neither a checkpoint nor a run")
    (tmp_path / "weights.bin").write_bytes(b"x")
    refuse(tmp_path / "weights.bin", r"weights come in as .safetensors, .onnx, .pth")
    with torch.no_grad():
        model.state_dict()["features.conv1.weight"][0, 0, 0, 0] = torch.nan
    config = make_config("demo", TINY)
    broken = Snapshot(
        step=1, epoch=0, samples_seen=1, config=config, classes=CLASSES, metrics={},
        states={"model": model.state_dict()},
    )  # fmt: skip
    refuse(save_checkpoint(tmp_path / "nan" / "checkpoints", broken), "holds weights that are not finite")
    for overrides, words in (
        (["freeze=features"], "freeze=features keeps the features as init_from has them, and there is no"),
        (
            ["freeze=features", "init_from=x", "parallel=hybrid"],
            "freeze=features leaves none: use parallel=ddp",
        ),
    ):
        with pytest.raises(UserError, match=words):
            make_config("demo", overrides)


@pytest.mark.parametrize("ghosts", [(), ("model.norm_batch=2",)])
def test_frozen_features_are_equal_to_the_bit_after_steps(
    world: World, tmp_path: Path, ghosts: tuple[str, ...]
) -> None:
    """Weights, norms and their statistics, also in the average; the noise is that of what trains."""
    settings = ("model.name=bn", "model.hidden_units=64", *ghosts)
    source = small_trainer(world, *settings, "seed=3")
    snapshot = Snapshot(
        step=1, epoch=0, samples_seen=4, config=source.config, classes=CLASSES, metrics={},
        states={"model": source.network.state_dict()},
    )  # fmt: skip
    folder = save_checkpoint(tmp_path / "run" / "checkpoints", snapshot)
    frozen = (*settings, f"init_from={folder}", "freeze=features", "optimizer.weight_decay=0.1")
    parts = small_trainer(world, *frozen, "ema_decay=0.5", "log_noise_scale=true", "micro_batch=2")
    before = {name: value.clone() for name, value in parts.network.state_dict().items()}
    for step in range(2):
        train_step(parts, [small_batch(last=False), small_batch()], 0.1, step)
    after = parts.network.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if name.startswith("classifier.")}
    assert parts.ema is not None and parts.noise is not None
    assert {n for n, v in parts.ema.values.items() if not torch.equal(v, before[n])} == changed
    assert all(p.grad is None for p in parts.network.features.parameters())
    held: list[Any] = [p for group in parts.optimizer.param_groups for p in group["params"]]
    assert sum(p.numel() for p in held) == sum(p.numel() for p in parts.network.classifier.parameters())
    assert len(parts.optimizer.state) == len(held) == 6
    assert parts.noise.read() is not None
