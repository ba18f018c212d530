"""The update against its formulas: SGD in torch's and in the paper's form, and LARS against NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from data_pipeline.common.errors import UserError
from train.config.load import make_config
from train.config.schema import OptimizerConfig
from train.models.alexnet import make_model
from train.models.init import Uninitialized
from train.optim.sgd import load_optimizer, make_optimizer, set_lr, start_momentum, update

Form = Literal["torch", "paper"]
NO, YES = torch.tensor(0.0), torch.tensor(1.0)


def tensors(rates: list[float], device: str = "cpu") -> list[torch.Tensor]:
    """Rates as `update` takes them."""
    return [torch.tensor(rate, device=device) for rate in rates]


@pytest.mark.parametrize("everything", [False, True])
def test_weight_decay_excludes_biases_and_norms_by_default(everything: bool) -> None:
    with Uninitialized():
        model = make_model(make_config("demo", ["model.name=bn"]).model, num_classes=10, crop_px=56)
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.1, decay_bias_and_norm=everything))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        spared = not everything and (name.endswith("bias") or "norm" in name)
        assert decay[id(parameter)] == (0.0 if spared else 0.1), name


def test_sgd_update_is_momentum_and_decay() -> None:
    """Against the formula: v = 0.9 v + g + 5e-4 w; w = w - lr v."""
    layer = nn.Linear(3, 2, bias=False)
    optimizer = make_optimizer(layer, OptimizerConfig())
    weight, velocity = layer.weight.detach().clone(), torch.zeros(2, 3)
    for learning_rate in (0.1, 0.05, 0.01):
        gradient = torch.randn(2, 3)
        layer.weight.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
        velocity = 0.9 * velocity + gradient + 5e-4 * weight
        weight = weight - learning_rate * velocity
        torch.testing.assert_close(layer.weight.detach(), weight)


@pytest.mark.parametrize("norm", ["norm1.weight", "norm1.bias"])
def test_biases_and_norms_can_have_their_own_rate(norm: str) -> None:
    with Uninitialized():
        model = make_model(make_config("demo", ["model.name=bn"]).model, num_classes=10, crop_px=56)
    optimizer = make_optimizer(model, OptimizerConfig(bias_and_norm_rate=2.0, decay_bias_and_norm=True))
    set_lr(optimizer, 0.1)
    named = dict(model.named_parameters())
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert rates[id(named[f"features.{norm}"])] == rates[id(named["classifier.fc6.bias"])] == (0.2, 5e-4)
    assert rates[id(named["features.conv1.weight"])] == (0.1, 5e-4)


def run(form: Form, rates: list[float], **changes: Any) -> list[float]:
    """One weight that starts at 1, under a gradient of 1: its values after each step."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 1.0)
    optimizer = make_optimizer(
        layer, OptimizerConfig(momentum=0.5, weight_decay=0.0, momentum_form=form, **changes)
    )
    start_momentum(optimizer)
    values = []
    for rate in rates:
        layer.weight.grad = torch.ones(1, 1)
        update(optimizer, NO, tensors(set_lr(optimizer, rate)))
        values.append(layer.weight.item())
    return values


def test_paper_velocity_is_torchs_until_the_rate_drops() -> None:
    """Steps by hand, m = 0.5: velocities 1, 1.5, 1.75 in torch's form; 0.1 of them in the paper's."""
    constant = [0.1, 0.1, 0.1]
    assert run("torch", constant) == pytest.approx([0.9, 0.75, 0.575])
    assert run("paper", constant) == pytest.approx(run("torch", constant), rel=1e-6)
    dropped = [0.1, 0.1, 0.01, 0.01]
    # torch: the drop acts at once, 0.01 x 1.75, 0.01 x 1.875
    assert run("torch", dropped) == pytest.approx([0.9, 0.75, 0.7325, 0.71375])
    # paper: the velocity of 0.15 dies out by half a step, 0.15 / 2 + 0.01, 0.085 / 2 + 0.01
    assert run("paper", dropped) == pytest.approx([0.9, 0.75, 0.665, 0.6125])


def test_paper_update_is_the_papers_formula() -> None:
    """v = 0.9 v - 0.0005 r w - r g; w = w + v, with a rate that changes at every step."""
    layer = nn.Linear(3, 2, bias=False)
    optimizer = make_optimizer(layer, OptimizerConfig(momentum_form="paper"))
    weight, velocity = layer.weight.detach().clone(), torch.zeros(2, 3)
    for rate in (0.1, 0.05, 0.01, 0.2):
        gradient = torch.randn(2, 3)
        layer.weight.grad = gradient.clone()
        set_lr(optimizer, rate)
        optimizer.step()
        velocity = 0.9 * velocity - 0.0005 * rate * weight - rate * gradient
        weight = weight + velocity
        torch.testing.assert_close(layer.weight.detach(), weight)
        assert [group["lr"] for group in optimizer.param_groups] == [rate]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0005]


def numpy_lars(
    weights: list[npt.NDArray[np.float64]],
    gradients: list[list[npt.NDArray[np.float64]]],
    rates: list[float],
    config: OptimizerConfig,
) -> list[npt.NDArray[np.float64]]:
    """You et al. 2017, algorithm 1, in float64; what has one dimension is plain SGD without decay."""
    weights, velocities = [w.copy() for w in weights], [np.zeros_like(w) for w in weights]
    for step, rate in enumerate(rates):
        for i, weight in enumerate(weights):
            gradient = gradients[step][i]
            if weight.ndim > 1:
                norm, decay = np.linalg.norm(weight), config.weight_decay
                size = np.linalg.norm(gradient)
                local = config.trust_coefficient * norm / (size + decay * norm) if norm and size else 1.0
                gradient = local * (gradient + decay * weight)
            if config.momentum_form == "paper":
                velocities[i] = config.momentum * velocities[i] + rate * gradient
                weights[i] = weight - velocities[i]
            else:
                velocities[i] = config.momentum * velocities[i] + gradient
                weights[i] = weight - rate * velocities[i]
    return weights


@contextmanager
def never_waiting(device: str) -> Iterator[None]:
    """On a GPU, fail where something waits for it; `tests.train.compile.test_choose` looks at operators."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("form", ["torch", "paper"])
def test_lars_matches_the_numpy_reference(form: Form, device: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    nn.init.zeros_(network[3].weight)  # type: ignore[arg-type]  # no ratio can be told of weights that are 0
    network.to(device)
    config = OptimizerConfig(name="lars", momentum_form=form, weight_decay=0.01, trust_coefficient=0.02)
    optimizer = make_optimizer(network, config)
    start_momentum(optimizer)
    parameters, random = list(network.parameters()), np.random.default_rng(0)
    start = [p.detach().double().cpu().numpy() for p in parameters]
    rates = [0.5, 2.0, 1.0, 0.1, 0.1]
    gradients = [[random.normal(size=p.shape) * 10.0**-i for p in parameters] for i in range(len(rates))]
    gradients[1][0] = np.zeros(parameters[0].shape)
    for rate, step in zip(rates, gradients, strict=True):
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = torch.from_numpy(gradient).float().to(device)
        on_device, skip = tensors(set_lr(optimizer, rate), device), NO.to(device)
        with never_waiting(device):
            update(optimizer, skip, on_device)
    expected = numpy_lars(start, gradients, rates, config)
    for parameter, value, before in zip(parameters, expected, start, strict=True):
        np.testing.assert_allclose(parameter.detach().cpu().numpy(), value, rtol=1e-4, atol=1e-6)
        assert np.abs(value - before).max() > 0.01


@pytest.mark.parametrize(("name", "form"), [("sgd", "paper"), ("lars", "torch"), ("lars", "paper")])
def test_sgd_skips_a_step_whatever_the_gradient(name: Any, form: Form) -> None:
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(layer, OptimizerConfig(name=name, momentum_form=form))
    start_momentum(optimizer)
    for bad in (False, True, True, False):
        held = [p.detach().clone() for p in layer.parameters()]
        velocities = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, float("nan") if bad else 1.0)
        update(optimizer, YES if bad else NO, tensors(set_lr(optimizer, 0.1)))
        same = [torch.equal(p, h) for p, h in zip(layer.parameters(), held, strict=True)]
        now = [s["momentum_buffer"] for s in optimizer.state.values()]
        same += [torch.equal(n, v) for n, v in zip(now, velocities, strict=True)]
        assert same == [bad] * 4


def test_velocities_are_restored_and_the_rest_is_configured() -> None:
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(layer, OptimizerConfig())
    layer(torch.ones(3)).sum().backward()
    set_lr(optimizer, 0.1)
    optimizer.step()
    state = optimizer.state_dict()
    other = make_optimizer(layer, OptimizerConfig(momentum=0.5, bias_and_norm_rate=2.0))
    load_optimizer(other, state)
    set_lr(other, 0.1)
    assert [(g["lr"], g["momentum"]) for g in other.param_groups] == [(0.1, 0.5), (0.2, 0.5)]
    for parameter in layer.parameters():
        velocity = optimizer.state[parameter]["momentum_buffer"]
        assert torch.equal(other.state[parameter]["momentum_buffer"], velocity) and velocity.abs().sum() > 0
    one_group = make_optimizer(layer, OptimizerConfig(decay_bias_and_norm=True))
    with pytest.raises(UserError, match="velocities are of other parameters"):
        load_optimizer(one_group, state)


@pytest.mark.parametrize("form", ["torch", "paper"])
def test_head_rate_multiplies_the_heads_update(form: Form) -> None:
    """v = 0.9 v + g + d w; w = w - r rate v for weights, twice the rate for biases, which do not decay."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    config = OptimizerConfig(bias_and_norm_rate=2.0, momentum_form=form)
    optimizer = make_optimizer(model, config, head=model[1], head_rate=10.0)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(value) for name, value in expected.items()}
    for _ in range(3):
        set_lr(optimizer, 0.01)
        for name, parameter in model.named_parameters():
            gradient = torch.randn(parameter.shape)
            parameter.grad = gradient.clone()
            rate = 0.01 * (10 if name.startswith("1.") else 1) * (2 if name.endswith("bias") else 1)
            decay = 0.0 if name.endswith("bias") else 5e-4
            velocity[name] = 0.9 * velocity[name] + gradient + decay * expected[name]
            expected[name] = expected[name] - rate * velocity[name]
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name])
    assert (
        make_optimizer(model, config, model[1], 1.0).state_dict()
        == make_optimizer(model, config).state_dict()
    )


def test_head_rate_multiplies_lars_ratio() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer = make_optimizer(model, OptimizerConfig(name="lars"), head=model[1], head_rate=10.0)
    set_lr(optimizer, 0.5)
    before = [p.detach().clone() for p in model.parameters()]
    gradients = [torch.randn(p.shape) for p in model.parameters()]
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    for rate, old, gradient, parameter in zip((0.5, 5.0), before, gradients, model.parameters(), strict=True):
        ratio = 0.001 * old.norm() / (gradient.norm() + 5e-4 * old.norm())
        torch.testing.assert_close(parameter.detach(), old - rate * ratio * (gradient + 5e-4 * old))
