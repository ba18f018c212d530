"""Checkpoints and weights from strangers: nothing in them is run, asks for memory, or names another place."""

from __future__ import annotations

import dataclasses
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import msgspec
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from alexnet import main
from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import MAX_SMALL_BYTES
from tests.helpers.bvlc import bvlc_file
from tests.helpers.checkpoint_samples import Evil, forge, small_snapshot
from train.checkpoints.format import MANIFEST, STATE, read_pointer
from train.checkpoints.load import load_checkpoint
from train.checkpoints.safe_load import MAX_PICKLE_BYTES
from train.checkpoints.write import save_checkpoint
from train.config.load import make_config, to_json
from train.optim.sgd import load_optimizer, make_optimizer
from train.runs.folder import create_run
from train.weights import import_weights

State = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a few numbers, for the test to change."""
    return save_checkpoint(tmp_path / "run" / "checkpoints", small_snapshot(3))


def files_of(path: Path) -> set[Path]:
    return set(path.rglob("*"))


def inspect(folder: Path) -> str:
    """The one line with which a checkpoint is refused; nothing is written."""
    before = files_of(folder.parents[2])
    result = CliRunner().invoke(main, ["checkpoint", "inspect", str(folder)])
    assert result.exit_code in (1, 2) and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "unexpected" not in line
    assert files_of(folder.parents[2]) == before
    return line


def bomb(levels: int = 60) -> Any:
    """A list of two to the power of `levels` texts, in a few hundred bytes."""
    value: Any = "boom"
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s["model"].update(x=Evil(Path("executed"))), "more than tensors and plain values"),
        (lambda s: s["model"].update(x=3), "Expected `Tensor`, got `int`"),
        (lambda s: s.update(model=[torch.zeros(3)]), "Expected `object`, got `array`"),
        (lambda s: s["model"].update(x=torch.zeros(1).expand(1 << 20, 1 << 20)), "less memory than numbers"),
        (lambda s: s["model"].update(x=torch.empty(1 << 40, device="meta")), "torch.strided, on meta"),
        (lambda s: s["model"].update(x=torch.eye(3).to_sparse()), "torch.sparse_coo"),
        (lambda s: s["optimizer"].update(state={0: {"momentum": "x"}}), "Expected `Tensor`, got `str`"),
        (lambda s: s.update(row={"num_steps": 3}), "missing required field `integers`"),
        (lambda s: s.update(classes=bomb()), "Expected `str`, got `array`"),
        (lambda s: s.update(classes="x" * (MAX_PICKLE_BYTES + 1)), "bytes beside its tensors, more than"),
        (lambda s: s.update(step="x"), "Expected `int`, got `str`"),
        (lambda s: s.update(step=4), "it is of step 4, its manifest of step 3"),
        (lambda s: s["config"].update(recipe="../../elsewhere"), "no / and no . first"),
        (lambda s: s["config"]["model"].update(name=bomb()), "Expected `str`, got `array`"),
        (lambda s: s["config"].update(surprise=1), "unknown key 'surprise'"),
        (lambda s: s["config"].update({"x" * 10**6: 1}), f"unknown key {'x' * 100!r};"),
    ],
)  # fmt: skip
def test_state_of_another_shape_is_refused_in_one_line(
    change: Callable[[State], None], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    state = torch.load(folder / STATE, weights_only=True)
    change(state)
    (folder / STATE).unlink()
    torch.save(state, folder / STATE)
    forge(folder)
    assert said in inspect(folder)


def rewrite(path: Path, compression: int, twice: bool) -> None:
    """The same archive, compressed, or with every entry listed twice over the same bytes."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        for entry in list(archive.filelist) if twice else ():
            again = copy(entry)
            again.filename += "x"
            archive.filelist.append(again)


def test_state_archive_cannot_hold_more_than_its_size(folder: Path) -> None:
    state = torch.load(folder / STATE, weights_only=True)
    torch.save(state | {"model": {"weight": torch.zeros(1 << 20)}}, folder / STATE)
    rewrite(folder / STATE, zipfile.ZIP_DEFLATED, twice=False)
    forge(folder)
    assert "is compressed, as torch never does" in inspect(folder)
    torch.save(state | {"model": {"weight": torch.zeros(1 << 20)}}, folder / STATE)
    rewrite(folder / STATE, zipfile.ZIP_STORED, twice=True)
    forge(folder)
    assert "holds more than its own size" in inspect(folder)


def test_state_files_of_other_kinds_are_refused(folder: Path) -> None:
    (folder / MANIFEST).rename(folder / "kept")
    (folder / MANIFEST).symlink_to("/dev/zero")
    assert "manifest.json is no regular file" in inspect(folder)
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_bytes(b" " * (MAX_SMALL_BYTES + 1))
    assert f"manifest.json is larger than {MAX_SMALL_BYTES} bytes" in inspect(folder)
    (folder / "kept").replace(folder / MANIFEST)
    (folder / STATE).unlink()
    os.mkfifo(folder / STATE)
    assert "state.pt is no regular file" in inspect(folder)


def test_manifest_and_pointer_cannot_name_other_files(folder: Path, tmp_path: Path) -> None:
    """A manifest and a pointer name no files: the step is a number, and the folder follows from it."""
    secret = tmp_path / "secret"
    secret.write_bytes((folder / STATE).read_bytes())
    forge(folder, file="../../../secret", state="/etc")
    assert load_checkpoint(folder).folder == folder
    for step in ('"../../../secret"', "1.5", "null"):
        (folder.parent / "best.json").write_text(f'{{"step": {step}, "top1": null}}')
        with pytest.raises(CorruptFileError, match=r"best.json is damaged: Expected `int`"):
            read_pointer(folder.parent / "best.json")
    forge(folder, step=9)
    assert "has the manifest of step 9" in inspect(folder)
    forge(folder, step=-9)
    assert "has the manifest of step -9" in inspect(folder)


@pytest.mark.parametrize("name", ["../x", "/tmp/x", ".", "..", "", "a/b", ".hidden", "a\0b", "x" * 101])
def test_recipe_name_cannot_leave_the_runs_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        to_json(make_config("demo")).replace('"demo"', msgspec.json.encode(name).decode())
    )
    with pytest.raises(UserError, match="names a run's folder: 1 to 100 characters"):
        make_config(str(tmp_path / "config.json"))


def test_network_is_built_only_where_the_weights_match_its_size(folder: Path) -> None:
    """65,536 hidden units would take 17 GB."""
    checkpoint = load_checkpoint(folder)
    config = make_config(
        "demo",
        [
            "model.hidden_units=65536",
            "model.stem_stride=1",
            "preprocessing.crop_px=4096",
            "preprocessing.resize_px=4096",
        ],
    )
    large = dataclasses.replace(checkpoint, config=config)
    with pytest.raises(
        UserError, match="its fully connected layers have 9 weights, those of its configuration"
    ):
        large.make_model()


def test_optimizer_velocities_of_other_shapes_are_refused() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(model, make_config("demo").optimizer)
    state = optimizer.state_dict() | {"state": {0: {"momentum_buffer": torch.zeros(3, 2)}}}
    with pytest.raises(UserError, match="momentum_buffer 0 is of another shape than its parameter"):
        load_optimizer(optimizer, state)


@pytest.mark.slow
def test_damaged_pickles_never_pass_the_checks(folder: Path) -> None:
    """Bytes of it changed, removed and doubled, under a manifest that fits: read, or refused in one line."""
    torch.save(torch.load(folder / STATE, weights_only=True), folder / STATE)  # with the checksums of zip
    with zipfile.ZipFile(folder / STATE) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (name,) = [name for name in entries if name.endswith("/data.pkl")]
    generator, whole, refused = random.Random(0), entries[name], 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(content))
            kind = generator.randrange(3)
            if kind == 0:
                content[place] = generator.randrange(256)
            elif kind == 1:
                del content[place : place + generator.randint(1, 9)]
            else:
                content[place:place] = content[place : place + generator.randint(1, 9)]
        with zipfile.ZipFile(folder / STATE, "w") as archive:
            for other, kept in entries.items():
                archive.writestr(other, bytes(content) if other == name else kept)
        forge(folder)
        try:
            load_checkpoint(folder)
        except (CorruptFileError, UserError) as error:
            assert len(str(error).splitlines()) == 1
            refused += 1
    assert refused > 200


def test_imported_weights_pass_the_same_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def refuse(name: str, error: type[Exception], text: str) -> None:
        before = files_of(tmp_path)
        with pytest.raises(error, match=text):
            import_weights(tmp_path / name, tmp_path / "out" / "runs")
        assert files_of(tmp_path) == before

    def metadata(**changes: Any) -> dict[str, str]:
        config = msgspec.to_builtins(make_config("demo")) | changes
        return {"config": msgspec.json.encode(config).decode(), "classes": '["a", "b"]'}

    weights = {"classifier.fc8.weight": torch.zeros(2, 3)}
    save_file(weights, tmp_path / "place.safetensors", metadata(recipe="../../elsewhere"))
    refuse("place.safetensors", CorruptFileError, "no / and no . first")
    save_file(
        weights, tmp_path / "large.safetensors", metadata(model={"hidden_units": 65536, "stem_stride": 2})
    )
    refuse(
        "large.safetensors", UserError, "fully connected layers have 6 weights, those of its configuration"
    )
    torch.save({"classifier.6.weight": torch.zeros(1).expand(1000, 1 << 30)}, tmp_path / "large.pth")
    refuse("large.pth", UserError, "less memory than numbers")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"x": Evil(tmp_path / "executed")}))
    refuse("old.pth", CorruptFileError, "more than tensors")

    file = bvlc_file()
    (tmp_path / "secret").write_bytes(bytes(4 * 4096))
    for node in file.graph.node:
        for source in node.input[1:3] if node.op_type in ("Conv", "Gemm") else ():
            tensor = onnx.TensorProto(name=source, data_type=1, dims=[4096], data_location="EXTERNAL")
            tensor.external_data.add(key="location", value="secret")
            file.graph.initializer.append(tensor)
    (tmp_path / "elsewhere.onnx").write_bytes(file.SerializeToString())
    refuse("elsewhere.onnx", UserError, "does not hold the values of .* itself")
    assert not (tmp_path / "executed").exists()


def test_own_state_files_are_read_again(tmp_path: Path) -> None:
    """The checks refuse nothing of ours: a row being counted, an average, a guard, labels."""
    states: dict[str, dict[str, Any]] = {
        **small_snapshot(1).states,
        "average": {"weight": torch.ones(3, 3)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3, 3)}, 1: {"momentum_buffer": None}},
                      "param_groups": [{"lr": 0.1, "nesterov": False, "foreach": None, "params": [0, 1]}]},
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "guard": {"counts": torch.zeros(4, dtype=torch.int64), "norms": torch.zeros(2, dtype=torch.float64)},
        "row": {"integers": torch.zeros(2, 4, dtype=torch.int64), "loss_sums": torch.zeros(2), "noise": None,
                "num_steps": 1, "skipped": 0, "seconds": 0.5},
    }  # fmt: skip
    state = dataclasses.replace(small_snapshot(1), states=states, labels_text=("eh", "bee"))
    run = create_run(tmp_path, state.config)
    found = load_checkpoint(save_checkpoint(run.checkpoints, state))
    assert found.labels_text == ("eh", "bee")
    for name, saved in states.items():
        assert str(found.states[name]) == str(saved)
    shutil.rmtree(run.path)
    assert all(isinstance(value, Tensor) for value in found.average_state.values())
