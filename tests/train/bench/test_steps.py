"""The cases of `alexnet bench train`: images on the device, and networks without their norms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers.wrong_steps import Fast, WrongGradient, candidate, read_seconds
from train.bench.steps import OurSteps, TorchvisionSteps
from train.bench.subjects import make_specs
from train.config.schema import ModelConfig
from train.distributed.world import World, open_world
from train.graphs.trial import Held
from train.graphs.verdict import read_record, task_of
from train.models.alexnet import make_model
from train.models.batch_norm import BatchNorm
from train.models.lrn import LocalResponseNorm

pytestmark = pytest.mark.slow

# Shapes: N images, H and W rows and columns, C channels.


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A CPU that is said to have graphs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("train.graphs.prover.time_steps", read_seconds)
    monkeypatch.setattr("train.graphs.choose.DEVICES", ("cpu",))
    with open_world("cpu") as one:
        yield one


def ours(world: World, subject: str) -> OurSteps:
    (spec,) = make_specs([subject], [2], "fp32", "cpu")
    return OurSteps(world, spec, 64, Path())


def test_our_step_is_the_one_that_is_proved(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.graphs.choose.candidates_of", lambda _: [candidate(Fast)])
    case = ours(world, "owt")
    assert isinstance(case.run, Fast)
    choice = case.choice()
    assert choice["step"] == "Fast" and "Fast is right, 500 ms" in str(choice["why"])
    held, calls = Held(case.parts), case.run.calls
    case.step()
    assert case.run.calls == calls + 1 and held.changed() != []
    (kept,) = (tmp_path / "cache" / "alexnet" / "steps").iterdir()
    assert read_record(kept) == case.record, "kept for a run with the same key, as its own would be"


def test_our_step_is_plain_where_the_fast_one_is_wrong_or_off(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.graphs.choose.candidates_of", lambda _: [candidate(WrongGradient)])
    choice = ours(world, "owt").choice()
    assert choice["step"] == "plain" and "not WrongGradient: in float32 the gradient of" in str(choice["why"])
    off = ours(world, "owt_plain").choice()
    assert (off["step"], off["why"]) == ("plain", "fused=off")
    assert len(list((tmp_path / "cache" / "alexnet" / "steps").iterdir())) == 1


@pytest.mark.usefixtures("no_compile_threads")
@pytest.mark.parametrize("names", [("paper", "paper_no_lrn", "paper_torch_lrn"), ("bn", "bn_no_norm")])
def test_verdicts_of_networks_without_norms_have_their_own_keys(names: tuple[str, ...]) -> None:
    with open_world("cpu") as world:
        tasks = [task_of(ours(world, name).parts) for name in names]
    assert len({task["layers"] for task in tasks}) == len(names)
    assert all({**task, "layers": ""} == {**tasks[0], "layers": ""} for task in tasks), "nothing else differs"


@pytest.mark.gpu
@pytest.mark.parametrize("subject", ["owt", "bn_no_norm"])
def test_our_step_is_chosen_and_trains_on_a_gpu(
    subject: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (spec,) = make_specs([subject], [8], "bf16", "cuda")
    with open_world("cuda") as world:
        case = OurSteps(world, spec, 64, tmp_path)
        assert [verdict.against for verdict in case.record.verdicts] == [None, None]
        counts = case.step()
        assert counts.integers[0] == 8 and torch.isfinite(counts.loss_sum)


def test_bn_without_norms_has_its_other_layers_alone(tmp_path: Path) -> None:
    (spec,) = make_specs(["bn_no_norm"], [2], "fp32", "cpu")
    with open_world("cpu") as world:
        case = OurSteps(world, spec, 64, tmp_path)
        assert isinstance(case.sample.images, torch.Tensor) and case.sample.images.shape == (2, 64, 64, 3)
        counts = case.step()
        assert counts.integers[0] == 2 and torch.isfinite(counts.loss_sum)
        network = case.parts.network
        names = [type(layer).__name__ for layer in network.features]
        assert names[:6] == ["Conv2d", "ReLU", "MaxPool2d"] * 2 and len(names) == 13
        assert all(layer.bias is None for layer in network.features if isinstance(layer, nn.Conv2d))
    whole = make_model(ModelConfig(name="bn"), num_classes=2, crop_px=224).features
    assert sum(isinstance(layer, BatchNorm) for layer in whole) == 5, "only the case has none"
    paper = make_model(ModelConfig(name="paper"), num_classes=2, crop_px=224).features
    assert sum(isinstance(layer, LocalResponseNorm) for layer in paper) == 2


def test_torchvision_trains_from_bytes_in_its_tuned_way(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda _self, mode: modes.append(mode))
    (plain,) = make_specs(["torchvision_amp"], [2], "fp32", "cpu")
    (tuned,) = make_specs(["torchvision_graphs"], [2], "fp32", "cuda")
    case = TorchvisionSteps(tuned, 64, torch.device("cpu"))
    assert modes == ["reduce-overhead"]
    assert case.images_NHWC.dtype == torch.uint8
    first = next(case.model.parameters())
    assert first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    before = first.detach().clone()
    figures = case.profile()
    assert not torch.equal(first, before) and torch.isfinite(first).all()
    assert figures["operators"] is not None and figures["operators"] > 50 and figures["kernel_ms"] is None
    assert case.optimizer.defaults["fused"] and not case.scaler.is_enabled()
    assert plain.precision == "bf16" and not plain.tuned
