"""The card and the weights of a run: true figures, no places of this machine, and never a reason to fail."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest
import torch
from markdown_it import MarkdownIt
from safetensors import safe_open

import train.runs.card
from data_pipeline.common.text import visible
from data_pipeline.datasets.dataset import Contents
from tests.helpers.checkpoint_samples import row, save_small_network
from train.checkpoints.format import Pointer, Snapshot, write_pointer
from train.checkpoints.load import Checkpoint, load_checkpoint
from train.checkpoints.share import without_places
from train.checkpoints.write import save_checkpoint
from train.config.load import make_config
from train.config.schema import ModelConfig
from train.runs.card import NETWORKS, count_parameters, run_card, share_best
from train.runs.folder import RunFolder
from train.weights import import_weights

SETTINGS = [
    'data.root="/srv/secret/place/my digits"', 'data.quarantine="/srv/secret/list.jsonl"', "epochs=3",
    "model.hidden_units=16", "ten_crop=true", "schedule.learning_rate=0.03",
]  # fmt: skip
DATA = {
    "train": Contents(num_samples=1437, num_quarantined=2, sha256=""),
    "val": Contents(num_samples=360, num_quarantined=0, sha256=""),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two checkpoints; the first is the best, and 2 of its 360 images could not be read."""
    folder = RunFolder(tmp_path / "runs" / "demo-1")
    states = {"model": {name: torch.zeros(3) for name in ("weight", "bn.running_mean")}}
    for step, top1 in ((23, 0.5), (46, 0.25)):
        folder.append(msgspec.structs.replace(row(step), split="val", samples=358, failed=2))
        snapshot = Snapshot(
            step=step,
            epoch=step // 23,
            samples_seen=step * 64,
            config=make_config("demo", SETTINGS),
            classes=tuple("0123456789"),
            metrics={"top1": top1, "top5": 0.75, "loss": 1.25},
            states=states,
            data=DATA,
        )
        save_checkpoint(folder.checkpoints, snapshot)
    write_pointer(folder.checkpoints, "best", Pointer(step=23, top1=0.5))
    return folder.path


def best(run: Path) -> Checkpoint:
    return load_checkpoint(run / "checkpoints" / "step-00000023")


def test_card_has_figures_denominators_and_settings(run: Path) -> None:
    share_best(run, Pointer(step=23, top1=0.5))
    card = (run / "README.md").read_text(encoding="utf-8")
    for text in (
        "| top-1 | 50.00% | 358 validation images (2 more could not be read) |",
        "Epoch 1 of 3, step 23; of all epochs the one with the highest top-1 on these same images",
        "the mean of ten views of each image",
        "`my digits`: 1,437 training images (2 more are left out as unreadable) and 360 validation images",
        "| `model.hidden_units` | `16` |",
        "| `schedule.learning_rate` | `0.03` |",
        "3 parameters, 10 classes",
        "`demo`, as it ships with alexnet, for 3 epoch(s) in batches of 64",
        "under the Apache License 2.0. That says nothing about the weights",
        "--recipe RUN/config.json --data DATA --resume RUN",
    ):
        assert text in card, text
    assert "secret" not in card and "| `seed`" not in card
    there = ["README.md", "checkpoints", "metrics.jsonl", "model.safetensors"]
    assert sorted(path.name for path in run.iterdir()) == there
    imported = run_card(replace(best(run), data={}, metrics={}))
    assert "`demo`: how imported weights were trained is not known here." in imported
    assert "The checkpoint of step 23 was not evaluated." in imported and "model-index" not in imported
    (run / "checkpoints" / "best.json").unlink()
    assert "step 23; chosen by name, and not by its accuracy" in run_card(best(run))


def test_weights_of_a_run_come_back_and_name_no_place(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder, _ = save_small_network(run / "checkpoints")
    original = load_checkpoint(folder)
    placed = msgspec.structs.replace(original.config.data, root="/srv/secret/x", quarantine="/srv/secret/q")
    snapshot = replace(original, config=msgspec.structs.replace(original.config, data=placed), step=4)
    save_checkpoint(run / "checkpoints", snapshot)
    share_best(run, Pointer(step=4, top1=0.5))
    with safe_open(run / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert "secret" not in json.dumps(metadata)
    came_back = load_checkpoint(import_weights(run / "model.safetensors", tmp_path / "runs"))
    assert came_back.config == without_places(original.config)
    assert came_back.model_state.keys() == original.model_state.keys()
    for name, value in original.model_state.items():
        assert torch.equal(came_back.model_state[name], value), name
    shutil.rmtree(run)


def test_names_do_not_break_the_card(run: Path) -> None:
    hostile = "`x`|\n# <b>[a](b)<b>\x1b"
    checkpoint = best(run)
    data = msgspec.structs.replace(checkpoint.config.data, root=f"/x/{hostile}")
    config = msgspec.structs.replace(checkpoint.config, recipe=f"r{hostile}", data=data)
    broken = replace(checkpoint, config=config, labels_text=(hostile, *map(str, range(9))))
    parser = MarkdownIt("commonmark").enable("table")

    whole, other = (parser.parse(run_card(one).partition("\n---\n")[2]) for one in (checkpoint, broken))
    shape = [token.type for token in whole if token.type in ("heading_open", "html_block", "hr")]
    assert shape == ["heading_open"] * 7
    assert shape == [token.type for token in other if token.type in ("heading_open", "html_block", "hr")]
    kinds = {child.type for token in other for child in token.children or []}
    assert not kinds & {"html_inline", "link_open", "image"}
    assert visible(hostile) in run_card(broken)


@pytest.mark.parametrize("problem", ["full disk", "damaged", "no checkpoint"])
def test_a_card_that_cannot_be_written_is_one_line(
    run: Path, problem: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    pointer: Pointer | None = Pointer(step=23, top1=0.5)
    if problem == "full disk":
        monkeypatch.setattr(train.runs.card, "write_atomic", full)
    elif problem == "damaged":
        (run / "checkpoints" / "step-00000023" / "state.pt").write_bytes(b"rust")
    else:
        pointer = None
    with caplog.at_level(logging.WARNING):
        share_best(run, pointer)
    (record,) = caplog.records
    assert "README.md and model.safetensors are not written: " in record.message
    words = {"full disk": "No space left on device", "damaged": "is damaged", "no checkpoint": "was saved"}
    assert words[problem] in record.message and not (run / "README.md").exists()


def test_every_network_has_words() -> None:
    assert set(NETWORKS) == set(get_args(get_type_hints(ModelConfig)["name"]))


def test_running_statistics_are_no_parameters(run: Path) -> None:
    assert count_parameters(best(run)) == 3
