"""The optimiser's step by one pass a parameter against `step`, in every form, with its half weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import conv2d

from tests.helpers.plain_kernels import PLAIN
from tests.helpers.triton import interpreted, needs_triton
from train.compile.update import update_weights
from train.config.schema import OptimizerConfig
from train.kernels.interface import triton_kernels
from train.kernels.stem import s2d_weights
from train.optim.half_weights import HalfWeights
from train.optim.sgd import apply_fused, make_optimizer, set_lr, start_momentum

FORMS: dict[str, dict[str, Any]] = {
    "sgd": {"weight_decay": 0.01},
    "nesterov": {"weight_decay": 0.01, "nesterov": True, "bias_and_norm_rate": 2.0},
    "paper": {"weight_decay": 0.01, "momentum_form": "paper", "decay_bias_and_norm": True},
    "lars": {"name": "lars", "weight_decay": 0.01, "trust_coefficient": 0.05},
    "lars, paper": {
        "name": "lars",
        "weight_decay": 0.01,
        "trust_coefficient": 0.05,
        "momentum_form": "paper",
    },
    "no momentum": {"momentum": 0.0},
}
STEPS, SKIPPED = 10, 3


def small_network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def interpreter_of(form: str, device: str) -> AbstractContextManager[None]:
    if form == "plain" or device == "cuda":
        return nullcontext()
    from train.kernels import sgd_triton

    return interpreted(sgd_triton)


@pytest.mark.parametrize(
    ("form", "device"),
    [
        ("plain", "cpu"),
        pytest.param("triton", "cpu", marks=[needs_triton, pytest.mark.slow]),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("name", FORMS)
def test_update_is_the_optimizers_step(name: str, form: str, device: str) -> None:
    """Ten steps at changing rates, one skipped for a NaN; rates as numbers and as tensors."""
    config, random = OptimizerConfig(**FORMS[name]), torch.Generator().manual_seed(0)
    theirs, ours = small_network().to(device), small_network().to(device)
    optimizers = [make_optimizer(network, config) for network in (theirs, ours)]
    for optimizer in optimizers:
        start_momentum(optimizer)
    halves, start = (
        HalfWeights(ours, torch.float16, optimizers[1]),
        [p.detach().clone() for p in ours.parameters()],
    )
    kernels = PLAIN if form == "plain" else triton_kernels()
    with interpreter_of(form, device):  # once, because it reads the kernels anew each time
        for step in range(STEPS):
            skip = torch.tensor(float(step == SKIPPED), device=device)
            for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                own.grad = torch.empty_like(own, device="cpu").normal_(generator=random).to(device)
                if step == SKIPPED:
                    own.grad.fill_(torch.nan)
                other.grad = own.grad.clone()
            for optimizer in optimizers:
                set_lr(optimizer, 0.1 / (1 + step))
            if step % 2:
                for group in optimizers[1].param_groups:
                    group["lr"] = torch.tensor(group["lr"], device=device)
            apply_fused(optimizers[0], skip)
            update_weights(optimizers[1], skip, halves, kernels)
            for parameter in ours.parameters():
                half = halves.copy_of(parameter)
                assert half is None or torch.equal(half, parameter.half())
            assert halves.refresh() == 0  # the pass has written them
    for own, other, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        torch.testing.assert_close(own, other, rtol=2e-6, atol=2e-6)
        assert (own - before).abs().max() > 1e-3
        if config.momentum:
            velocities = [
                o.state[p]["momentum_buffer"] for o, p in zip(optimizers, (other, own), strict=True)
            ]
            torch.testing.assert_close(velocities[1], velocities[0], rtol=2e-6, atol=2e-6)


def test_gradients_of_a_regrouped_stem_have_its_layout() -> None:
    """In the order of the memory, as the pass wants them, though they come through a permutation."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 11, stride=4, padding=2).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(conv, OptimizerConfig())
    start_momentum(optimizer)
    set_lr(optimizer, 0.1)
    halves = HalfWeights(conv, torch.bfloat16, optimizer)
    inputs, bias = torch.randn(2, 48, 9, 9).bfloat16(), conv.bias
    assert bias is not None
    before, skip = conv.weight.detach().clone(), torch.tensor(0.0)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        maps = conv2d(inputs, s2d_weights(halves.half_of(conv.weight), 4), halves.half_of(bias))
        torch.autograd.backward(maps.float().square().mean())
        assert conv.weight.grad is not None and conv.weight.grad.stride() == conv.weight.stride()
        assert conv.weight.grad.dtype == torch.float32
        update_weights(optimizer, skip, halves, PLAIN)
    assert (conv.weight - before).abs().max() > 1e-4 and halves.refresh() == 0


def test_update_leaves_what_has_no_gradient() -> None:
    network = small_network()
    optimizer = make_optimizer(network, OptimizerConfig())
    start_momentum(optimizer)
    set_lr(optimizer, 0.1)
    before = [p.detach().clone() for p in network.parameters()]
    last = network[3]
    assert isinstance(last, nn.Linear)
    last.weight.grad = torch.ones_like(last.weight)
    update_weights(optimizer, torch.tensor(0.0), None, PLAIN)
    same = [torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True)]
    assert same == [True, True, True, True, False, True]
