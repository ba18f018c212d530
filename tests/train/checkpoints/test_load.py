"""Checkpoints are verified before they are loaded, and nothing in them is executed."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import sha256_of, write_json
from infer.export.pipeline import make_origin
from tests.helpers.checkpoint_samples import (
    CLASSES,
    Evil,
    forge,
    replace,
    save_small_network,
    small_config,
)
from tests.helpers.command_line import assert_one_line, invoke
from train.checkpoints.format import MANIFEST, STATE, Pointer, read_pointer
from train.checkpoints.load import find_best, find_checkpoint, load_checkpoint, load_weights
from train.config.load import make_config
from train.models.alexnet import AlexNet, make_model
from train.runs.resume import find_resumable
from train.weights import export_weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AlexNet]:
    return save_small_network(tmp_path_factory.mktemp("run") / "checkpoints")


@pytest.fixture
def copied(saved: tuple[Path, AlexNet], tmp_path: Path) -> Path:
    """A checkpoint to damage: hard links, each replaced by the test that writes to it."""
    folder = tmp_path / "run" / "checkpoints" / saved[0].name
    folder.mkdir(parents=True)
    for file in saved[0].iterdir():
        os.link(file, folder / file.name)
    return folder


def test_load_returns_what_was_saved(saved: tuple[Path, AlexNet]) -> None:
    folder, model = saved
    checkpoint = load_checkpoint(folder)
    assert (checkpoint.step, checkpoint.epoch, checkpoint.samples_seen) == (3, 1, 192)
    assert checkpoint.config == small_config()
    assert checkpoint.preprocessing == small_config().preprocessing
    assert checkpoint.classes == CLASSES
    assert checkpoint.metrics == {"top1": 0.5}
    for name, value in model.state_dict().items():
        assert torch.equal(checkpoint.model_state[name], value)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["step-00000003"]
    assert not checkpoint.make_model().training


@pytest.mark.parametrize("where", [100, -100])
def test_flipped_bit_is_found(copied: Path, where: int) -> None:
    content = bytearray((copied / STATE).read_bytes())
    content[where] ^= 1
    replace(copied / STATE, bytes(content))
    with pytest.raises(CorruptFileError, match="is damaged"):
        load_checkpoint(copied)


@pytest.mark.parametrize("keep", [0, 1000])
def test_truncated_file_is_found(copied: Path, keep: int) -> None:
    replace(copied / STATE, (copied / STATE).read_bytes()[:keep])
    with pytest.raises(CorruptFileError, match=rf"is damaged: it has {keep} of"):
        load_checkpoint(copied)


def test_checkpoint_that_is_removed_meanwhile_is_an_error(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training removes old ones at any time."""

    def remove_first(path: Path) -> str:
        path.unlink()
        return sha256_of(path)

    monkeypatch.setattr("train.checkpoints.load.sha256_of", remove_first)
    with pytest.raises(CorruptFileError, match=rf"{STATE} cannot be read: No such file"):
        load_checkpoint(copied)


def test_missing_and_broken_manifests_are_errors(copied: Path) -> None:
    replace(copied / MANIFEST, b'{"format": 1')
    with pytest.raises(CorruptFileError, match=r"manifest .* is damaged"):
        load_checkpoint(copied)
    (copied / MANIFEST).unlink()
    with pytest.raises(CorruptFileError, match="no readable manifest"):
        load_checkpoint(copied)


@pytest.mark.parametrize(
    ("old", "new"), [(b"0.5", b"0.6"), (b'"epoch": 1', b'"epoch": 2'), (b"last", b"average")]
)
def test_changed_manifest_is_refused_by_whatever_reads_it(old: bytes, new: bytes, copied: Path) -> None:
    text = (copied / MANIFEST).read_bytes()
    replace(copied / MANIFEST, text.replace(b"\n", b"").replace(b" ", b""))
    assert load_checkpoint(copied).metrics == {"top1": 0.5}, "its spaces are nobody's concern"
    assert text.count(old) == 1
    replace(copied / MANIFEST, text.replace(old, new))
    refused = f"{copied / MANIFEST} is not what was written: it does not match its manifest_sha256; use an"
    for command in (["checkpoint", "inspect"], ["export"], ["evaluate"]):
        assert_one_line(invoke(*command, copied), 1, refused)
    assert_one_line(invoke("checkpoint", "verify", copied.parents[1]), 1, "1 of 1 checkpoints are damaged")
    write_json(copied.parents[1] / "config.json", small_config())
    with pytest.raises(CorruptFileError, match="is not what was written"):
        find_resumable(copied.parents[2], str(copied), small_config())
    with pytest.raises(CorruptFileError, match=r"no checkpoint of .* is whole"):
        find_resumable(copied.parents[2], str(copied.parents[1]), small_config())
    assert find_best(copied.parent, 3) is None


def test_checkpoint_load_executes_nothing(copied: Path, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    (copied / STATE).unlink()
    torch.save({"model": Evil(target)}, copied / STATE)
    forge(copied)
    with pytest.raises(CorruptFileError, match="more than tensors and plain values"):
        load_checkpoint(copied)
    assert not target.exists()


def test_other_files_and_other_formats_are_refused(copied: Path) -> None:
    (copied / STATE).unlink()
    torch.save({"weights": torch.zeros(3)}, copied / STATE)
    forge(copied)
    with pytest.raises(CorruptFileError, match="of ours: Object missing required field `step`"):
        load_checkpoint(copied)
    forge(copied, format=99)
    with pytest.raises(UserError, match=r"has format 99; this version reads 1$"):
        load_checkpoint(copied)


def test_average_is_evaluated_exported_and_converted(saved: tuple[Path, AlexNet], tmp_path: Path) -> None:
    average = {name: value + 1 for name, value in saved[1].state_dict().items()}
    checkpoint = load_checkpoint(saved[0])
    checkpoint = dataclasses.replace(checkpoint, states=checkpoint.states | {"average": average})
    assert checkpoint.weights_name == "average"
    export_weights(checkpoint, tmp_path / "weights.safetensors", "safetensors")
    for weights in (checkpoint.make_model().state_dict(), load_file(tmp_path / "weights.safetensors")):
        assert all(torch.equal(weights[name], value) for name, value in average.items())
    assert make_origin(checkpoint).weights == "average"
    assert make_origin(load_checkpoint(saved[0])).weights == "last"


def test_weights_of_another_model_are_refused_with_difference(saved: tuple[Path, AlexNet]) -> None:
    other = make_model(make_config("demo", ["model.name=owt"]).model, num_classes=10, crop_px=56)
    with pytest.raises(UserError, match=r"holds another model's weights \(\d+ tensors differ, first "):
        load_weights(other, load_checkpoint(saved[0]).model_state, source=saved[0])


def test_checkpoint_is_found_by_run_step_and_newest(copied: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        find_checkpoint(run)
    write_json(run / "checkpoints" / "best.json", Pointer(step=3, top1=0.5))
    assert find_checkpoint(run) == find_checkpoint(copied) == find_checkpoint(copied / STATE) == copied
    assert find_checkpoint(copied / MANIFEST) == copied
    assert find_checkpoint(None, runs=tmp_path) == copied
    with pytest.raises(UserError, match="does not exist"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(UserError, match="train first"):
        find_checkpoint(None, runs=tmp_path / "nothing")
    (run / "checkpoints" / "best.json").write_bytes(b"{}")
    with pytest.raises(CorruptFileError, match="is damaged"):
        read_pointer(run / "checkpoints" / "best.json")
