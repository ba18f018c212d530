"""Weights in and out: what comes back computes the same, and what is foreign is refused."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
import pytest
import torch
import torchvision
from click.testing import CliRunner
from safetensors.torch import save_file

from alexnet import main
from data_pipeline.common.errors import CorruptFileError, UserError
from tests.helpers.bvlc import bvlc_file
from tests.helpers.checkpoint_samples import Evil, save_small_network
from tests.helpers.ranks import TINY
from train.checkpoints.load import find_checkpoint, load_checkpoint
from train.checkpoints.write import save_checkpoint
from train.config.load import make_config
from train.models.alexnet import Normalize, make_model
from train.models.init import Uninitialized
from train.weights import export_weights, import_weights, inspect_checkpoint, read_names


def test_weights_round_trip_through_safetensors(tmp_path: Path) -> None:
    folder, model = save_small_network(tmp_path / "run" / "checkpoints")
    checkpoint = load_checkpoint(folder)
    export_weights(checkpoint, tmp_path / "w.safetensors", "safetensors")
    back = load_checkpoint(import_weights(tmp_path / "w.safetensors", tmp_path / "runs"))
    assert (back.config, back.classes) == (checkpoint.config, checkpoint.classes)
    for name, value in model.state_dict().items():
        assert torch.equal(back.model_state[name], value), name
    assert find_checkpoint(None, runs=tmp_path / "runs") == back.folder
    with pytest.raises(
        UserError, match="is `owt` with 4096 hidden units; this checkpoint is `paper` with 64"
    ):
        export_weights(checkpoint, tmp_path / "w.pth", "torchvision")


@pytest.mark.slow
def test_weights_round_trip_through_torchvision(tmp_path: Path) -> None:
    theirs = torchvision.models.alexnet(num_classes=7).eval()
    torch.save(theirs.state_dict(), tmp_path / "in.pth")
    classes = tuple("abcdefg")
    imported = load_checkpoint(import_weights(tmp_path / "in.pth", tmp_path / "runs", classes))
    assert (imported.classes, imported.config.model.name, imported.preprocessing.crop_px) == (
        classes,
        "owt",
        224,
    )
    images_NCHW = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            imported.make_model()(images_NCHW), theirs(images_NCHW), rtol=1e-4, atol=1e-5
        )
    export_weights(imported, tmp_path / "out.pth", "torchvision")
    padded = msgspec.structs.replace(
        imported.config, model=msgspec.structs.replace(imported.config.model, pool_padding=1)
    )
    with pytest.raises(UserError, match=r"is `owt \(pool_padding=1\)` with 4096"):
        export_weights(replace(imported, config=padded), tmp_path / "padded.pth", "torchvision")
    with Uninitialized():
        fresh = torchvision.models.alexnet(num_classes=7)
    fresh.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    with pytest.raises(UserError, match="has 7 classes, and 2 names were given"):
        import_weights(tmp_path / "in.pth", tmp_path / "runs", ("a", "b"))


@pytest.mark.slow
def test_wrapped_weights_come_in_with_a_line_that_says_so(tmp_path: Path) -> None:
    """As torchvision's references save them, under DDP, in a file with the suffixes in upper case."""
    with Uninitialized():
        theirs = torchvision.models.alexnet(num_classes=2)
    for value in theirs.state_dict().values():  # other numbers in each place, and none of them NaN
        value.copy_(torch.arange(value.numel()).view_as(value))
    path = tmp_path / "MODEL_BEST.PTH.TAR"
    wrapped = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"model": wrapped, "epoch": 3, "args": argparse.Namespace(lr=0.01)}, path)
    done = CliRunner().invoke(main, ["checkpoint", "convert", str(path), str(tmp_path / "runs")])
    assert done.exit_code == 0
    assert done.stderr == (
        f'{path}: wrapped weights: in "model"; names without "module."; '
        "skipped without running it: argparse.Namespace\n"
    )
    imported = load_checkpoint(Path(done.stdout.strip()))
    assert imported.model_state.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(imported.model_state[name], value), name


@pytest.mark.slow
def test_bvlc_weights_see_the_pixels_that_caffe_showed_them(tmp_path: Path) -> None:
    """Our RGB pipeline against Caffe's arithmetic: BGR, 0..255, minus the mean, on the original filters."""
    file = bvlc_file()
    generator = np.random.default_rng(0)
    layers = [node for node in file.graph.node if node.op_type in ("Conv", "Gemm")]
    shapes = [
        (96, 3, 11, 11), (256, 48, 5, 5), (384, 256, 3, 3), (384, 192, 3, 3), (256, 192, 3, 3),
        (4096, 9216), (4096, 4096), (10, 4096),
    ]  # fmt: skip
    filters: dict[str, npt.NDArray[np.float32]] = {}
    for node, shape in zip(layers, shapes, strict=True):
        for name, size in zip(node.input[1:3], (shape, shape[:1]), strict=True):
            value = np.zeros(size, np.float32)
            if len(filters) < 2:  # those of the first convolution alone are looked at
                value = generator.normal(0, 0.01, size).astype(np.float32)
            filters[name] = value
            file.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(file, tmp_path / "bvlc.onnx")
    imported = load_checkpoint(import_weights(tmp_path / "bvlc.onnx", tmp_path / "runs"))
    assert imported.classes == tuple("0123456789")
    assert (imported.config.model.name, imported.preprocessing.crop_px) == ("caffe", 227)

    pixels_NHWC = torch.from_numpy(generator.integers(0, 256, (1, 227, 227, 3), dtype=np.uint8))
    features = imported.make_model().features
    assert isinstance(features, torch.nn.Sequential)
    with torch.no_grad():
        ours = features[0](Normalize(imported.preprocessing)(pixels_NHWC))
    bgr_NCHW = pixels_NHWC.flip(3).permute(0, 3, 1, 2).float()
    mean = torch.tensor([104.00698793, 116.66876762, 122.67891434]).view(1, 3, 1, 1)
    weight, bias = (torch.from_numpy(filters[name]) for name in layers[0].input[1:3])
    theirs = torch.nn.functional.conv2d(bgr_NCHW - mean, weight, bias, stride=4)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-3)
    assert theirs.abs().mean() > 1


def test_weights_that_are_foreign_or_crafted_are_refused(tmp_path: Path) -> None:
    def refuse(name: str, error: type[Exception], text: str) -> None:
        with pytest.raises(error, match=text):
            import_weights(tmp_path / name, tmp_path / "runs")

    refuse("missing.pth", UserError, "does not exist")
    refuse("weights.bin", UserError, "come in as .safetensors")
    torch.save({"x": Evil(tmp_path / "executed")}, tmp_path / "evil.pth")
    refuse("evil.pth", CorruptFileError, "more than tensors")
    assert not (tmp_path / "executed").exists()
    (tmp_path / "junk.pth").write_bytes(b"junk")
    refuse("junk.pth", CorruptFileError, "junk.pth")
    torch.save({"fc.weight": torch.zeros(4, 4)}, tmp_path / "other.pth")
    refuse("other.pth", UserError, "another model's weights .*; what can come in is torchvision's `alexnet`")
    torch.save({"state_dict": {"module.fc.weight": torch.zeros(4, 4)}, "epoch": 1}, tmp_path / "other.CKPT")
    refuse("other.CKPT", UserError, "another model's weights .*; what can come in is torchvision's `alexnet`")
    torch.save(torch.nn.Linear(2, 3), tmp_path / "whole.pt")
    refuse(
        "whole.pt", UserError, "holds torch.nn.modules.linear.Linear as an object, .* save model.state_dict"
    )
    own, _ = save_small_network(tmp_path / "own" / "checkpoints")
    refuse(str(own / "state.pt"), UserError, "is a checkpoint of ours already")
    torch.save({"a": torch.zeros(4)}, tmp_path / "flat.pth")
    refuse("flat.pth", UserError, "no fully connected layer")
    save_file({"a": torch.zeros(4)}, tmp_path / "bare.safetensors")
    refuse("bare.safetensors", UserError, "does not say which network")
    (tmp_path / "junk.safetensors").write_bytes(b"\xff" * 100)
    refuse("junk.safetensors", CorruptFileError, "cannot be read as safetensors")
    (tmp_path / "junk.onnx").write_bytes(b"\xff" * 100)
    refuse("junk.onnx", CorruptFileError, "cannot be read as ONNX")
    onnx.save(bvlc_file(), tmp_path / "empty.onnx")
    refuse("empty.onnx", UserError, "does not hold the values")
    assert not (tmp_path / "runs").exists()


def test_checkpoint_commands_inspect_verify_and_convert(tmp_path: Path) -> None:
    folder, _ = save_small_network(tmp_path / "run" / "checkpoints")
    run = tmp_path / "run"

    def invoke(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["checkpoint", *map(str, arguments)])
        return result.exit_code, result.output

    code, said = invoke("inspect", folder)
    assert code == 0
    assert '"model": "paper"' in said and '"step": 3' in said
    assert invoke("verify", run) == (0, f"{folder}: ok\n")
    code, said = invoke("convert", folder, tmp_path / "w.safetensors", "--to", "safetensors")
    assert (code, said.strip()) == (0, str(tmp_path / "w.safetensors"))
    code, said = invoke("convert", tmp_path / "w.safetensors", tmp_path / "runs")
    assert code == 0
    assert Path(said.strip()).name == "step-00000000"
    (folder / "state.pt").write_bytes(b"")
    code, said = invoke("verify", run)
    assert code == 1
    assert "error: 1 of 1 checkpoints are damaged" in said


def test_inspected_parameters_have_no_running_statistics(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save_small_network(tmp_path / "checkpoints")[0])
    normed = make_config("demo", [*TINY, "model.name=bn"])
    network = make_model(normed.model, num_classes=10, crop_px=22)
    saved = replace(checkpoint, config=normed, states={"model": network.state_dict()})
    found = inspect_checkpoint(save_checkpoint(tmp_path / "checkpoints", saved))
    assert found["parameters"] == sum(parameter.numel() for parameter in network.parameters())
    assert found["parameters"] < sum(tensor.numel() for tensor in network.state_dict().values())


def test_class_names_are_read_as_editors_write_them(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    for content in (b"cat\nB\xc3\xa4r\n", b"\xef\xbb\xbfcat\r\nB\xc3\xa4r", b"cat \nB\xc3\xa4r\n\n \n\n"):
        path.write_bytes(content)
        assert read_names(path) == ("cat", "Bär")
    for content, words in (
        (b"cat\n\ndog\n", r"classes.txt line 2 is empty: name a class in each line"),
        (b"\n\n", "holds no names"),
        ("\ufeffcat".encode("utf-16-le"), "is text in UTF-16: save it as UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_names(path)
    with pytest.raises(UserError, match=r"--classes .*gone cannot be read: No such file"):
        read_names(tmp_path / "gone")


def test_converted_weights_replace_no_file(tmp_path: Path) -> None:
    folder, _ = save_small_network(tmp_path / "run" / "checkpoints")
    checkpoint = load_checkpoint(folder)
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    (tmp_path / "link.safetensors").symlink_to(folder / "state.pt")
    for name, words in (
        ("mine.safetensors", "TARGET .*mine.safetensors exists: weights are never replaced; name another"),
        ("link.safetensors", "TARGET .*link.safetensors is an input"),
    ):
        with pytest.raises(UserError, match=words):
            export_weights(checkpoint, tmp_path / name, "safetensors")
    assert (tmp_path / "mine.safetensors").read_bytes() == b"mine"
    assert load_checkpoint(folder).sha256 == checkpoint.sha256
    export_weights(checkpoint, tmp_path / "w.safetensors", "safetensors")
    with pytest.raises(UserError, match=r"w.safetensors is a file: name a folder for the new run"):
        import_weights(tmp_path / "w.safetensors", tmp_path / "w.safetensors")
