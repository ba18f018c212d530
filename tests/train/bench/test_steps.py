"""The steps of `alexnet bench train`: images on the device, and networks without their norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import nn
from torchvision.models import alexnet

from tests.helpers.wrong_steps import Fast, WrongGradient, candidate, read_seconds
from train.bench.subjects import make_specs
from train.bench.trainer import OurStep, StepCase, torchvision_step
from train.config.schema import ModelConfig
from train.distributed.world import World, open_world
from train.graphs.trial import Held
from train.graphs.verdict import read_record, task_of
from train.models.alexnet import make_model
from train.models.batch_norm import BatchNorm
from train.models.lrn import LocalResponseNorm

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thin")]

# Shapes: N images, H and W rows and columns, C channels.


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A CPU that is said to have graphs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("train.graphs.prover.time_steps", read_seconds)
    monkeypatch.setattr("train.graphs.choose.DEVICES", ("cpu",))
    with open_world("cpu") as one:
        yield one


@pytest.fixture
def small_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's network without its hidden layers, which are 54 of its 61 million weights."""

    def make(num_classes: int) -> nn.Module:
        model: nn.Module = alexnet(num_classes=num_classes)
        model.classifier = nn.Linear(256 * 6 * 6, num_classes)
        return model

    monkeypatch.setattr("torchvision.models.alexnet", make)


def ours(world: World, subject: str) -> OurStep:
    (spec,) = make_specs([subject], [2], "fp32", "cpu")
    return OurStep(world, replace(spec, keys=(*spec.keys, "model.hidden_units=64")), 64)


def test_our_step_is_the_one_that_is_proved(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.graphs.choose.candidates_of", lambda _: [candidate(Fast)])
    step = ours(world, "owt")
    assert isinstance(step.run, Fast)
    assert step.facts["step"] == "Fast" and "Fast is right, 500 ms" in str(step.facts["why"])
    held, calls = Held(step.parts), step.run.calls
    step()
    assert step.run.calls == calls + 1 and held.changed() != []
    (kept,) = (tmp_path / "cache" / "alexnet" / "steps").iterdir()
    assert read_record(kept) == step.record, "kept for a run with the same key, as its own would be"


def test_our_step_is_plain_where_the_fast_one_is_wrong_or_off(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.graphs.choose.candidates_of", lambda _: [candidate(WrongGradient)])
    facts = ours(world, "owt").facts
    assert facts["step"] == "plain" and "not WrongGradient: in float32 the gradient of" in str(facts["why"])
    off = ours(world, "owt_plain").facts
    assert (off["step"], off["why"]) == ("plain", "fused=off")
    assert len(list((tmp_path / "cache" / "alexnet" / "steps").iterdir())) == 1


@pytest.mark.parametrize("names", [("paper", "paper_no_lrn", "paper_torch_lrn"), ("bn", "bn_no_norm")])
def test_verdicts_of_networks_without_norms_have_their_own_keys(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.bench.trainer.fuse_lrn", lambda *_: None)  # it takes half a minute
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
        step = OurStep(world, spec, 64)
        assert step.record and [verdict.against for verdict in step.record.verdicts] == [None, None]
        counts = step()
        assert counts.integers[0] == 8 and torch.isfinite(counts.loss_sum)


def test_bn_without_norms_has_its_other_layers_alone() -> None:
    with open_world("cpu") as world:
        step = ours(world, "bn_no_norm")
        assert isinstance(step.sample.images, torch.Tensor) and step.sample.images.shape == (2, 64, 64, 3)
        counts = step()
        assert counts.integers[0] == 2 and torch.isfinite(counts.loss_sum)
        network = step.parts.network
        names = [type(layer).__name__ for layer in network.features]
        assert names[:6] == ["Conv2d", "ReLU", "MaxPool2d"] * 2 and len(names) == 13
        assert all(layer.bias is None for layer in network.features if isinstance(layer, nn.Conv2d))
    whole = make_model(ModelConfig(name="bn"), num_classes=2, crop_px=224).features
    assert sum(isinstance(layer, BatchNorm) for layer in whole) == 5, "only the case has none"
    paper = make_model(ModelConfig(name="paper"), num_classes=2, crop_px=224).features
    assert sum(isinstance(layer, LocalResponseNorm) for layer in paper) == 2


@pytest.mark.usefixtures("small_torchvision")
def test_torchvision_trains_from_bytes_in_its_tuned_way(monkeypatch: pytest.MonkeyPatch) -> None:
    models: dict[str, nn.Module] = {}
    optimizers: list[torch.optim.SGD] = []
    inputs: list[torch.Tensor] = []
    SGD = torch.optim.SGD

    def keep(*args: Any, **options: Any) -> torch.optim.SGD:
        optimizers.append(SGD(*args, **options))
        return optimizers[0]

    monkeypatch.setattr(nn.Module, "compile", lambda model, mode: models.update({mode: model}))
    monkeypatch.setattr(torch.optim, "SGD", keep)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    (plain,) = make_specs(["torchvision_amp"], [2], "fp32", "cpu")
    (tuned,) = make_specs(["torchvision_graphs"], [2], "fp32", "cuda")
    assert plain.precision == "bf16" and not plain.tuned and tuned.precision == "bf16"
    step = torchvision_step(tuned, 64, torch.device("cpu"))
    model = models["reduce-overhead"]
    model.register_forward_pre_hook(lambda _, args: inputs.extend(args))
    first = next(model.parameters())
    assert first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    before = first.detach().clone()
    step()
    assert not torch.equal(first, before) and torch.isfinite(first).all()
    assert inputs[0].shape == (2, 3, 64, 64) and inputs[0].is_contiguous(memory_format=torch.channels_last)
    assert inputs[0].dtype == torch.float32 and -3 < float(inputs[0].min()) < 0, "normalised bytes"
    assert optimizers[0].defaults["fused"] and optimizers[0].defaults["momentum"] == 0.9


@pytest.mark.usefixtures("small_torchvision")
def test_steps_are_timed_and_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("KINETO_LOG_LEVEL", "6")
    monkeypatch.setattr(
        "train.bench.trainer.cpu_share", lambda _: 1
    )  # torch's other threads wait by spinning
    (spec,) = make_specs(["torchvision_fp32"], [2], "fp32", "cpu")
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        case = StepCase(stack, "cpu", spec, 64)
    step, calls = case.step, []
    case.step = lambda: calls.append(step())
    figures = case.measure(2, 1)
    assert len(calls) == 3 and set(figures) == {"images_per_s", "peak_memory_mb"}
    assert figures["images_per_s"] > 0 and figures["peak_memory_mb"] > 100
    assert set(case.start()) == {"first_step_s"}
    assert list(events := case.profile()) == ["operators"] and events["operators"] > 50
