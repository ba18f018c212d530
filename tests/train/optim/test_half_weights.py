"""The weights in the autocast type: never stale, whatever changed them, and gradients that are autocast's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.step_samples import small_batch, small_trainer
from train.checkpoints.load import load_weights
from train.config.schema import OptimizerConfig
from train.distributed.world import open_world
from train.models.batch_norm import BatchNorm
from train.models.init import initialize
from train.optim.ema import ModelEma
from train.optim.half_weights import HalfWeights
from train.optim.sgd import apply_fused, make_optimizer, set_lr, start_momentum
from train.step import train_step


def small_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 4, 3), BatchNorm(4, None), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def find_stale(network: nn.Module, halves: HalfWeights) -> list[str]:
    """Names of the parameters whose copies are not what they would be cast to now."""
    pairs = {name: (p, halves.copy_of(p)) for name, p in network.named_parameters()}
    return [
        n for n, (p, half) in pairs.items() if half is not None and not torch.equal(half, p.to(half.dtype))
    ]


def small_halves(
    network: nn.Module, dtype: torch.dtype = torch.bfloat16
) -> tuple[HalfWeights, torch.optim.SGD]:
    optimizer = make_optimizer(network, OptimizerConfig())
    return HalfWeights(network, dtype, optimizer), optimizer


def step_once(optimizer: torch.optim.SGD) -> None:
    """A step of torch's fused kernel, with a gradient of ones."""
    start_momentum(optimizer)
    set_lr(optimizer, 0.1)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    apply_fused(optimizer, torch.tensor(0.0))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "initialisation": lambda network: initialize(network, "he"),
    "loading": lambda network: network.load_state_dict(small_network(seed=1).state_dict()),
    "another rank's weights": lambda network: [p.detach().copy_(p + 1) for p in network.parameters()],
}


@pytest.mark.parametrize("name", [*CHANGES, "torch's optimiser"])
def test_copies_are_refreshed_after(name: str) -> None:
    network = small_network()
    halves, optimizer = small_halves(network)
    assert not find_stale(network, halves) and halves.refresh() == 0
    if name == "torch's optimiser":
        step_once(optimizer)
    else:
        with torch.no_grad():
            CHANGES[name](network)
    stale = find_stale(network, halves)
    assert {"0.weight", "4.weight"} <= set(stale), "the change must be seen"
    assert halves.refresh() >= len(stale)
    assert not find_stale(network, halves) and halves.refresh() == 0


def test_copies_follow_the_average_in_and_out() -> None:
    network = small_network()
    (halves, optimizer), average = small_halves(network), ModelEma(network, 0.9)
    step_once(optimizer)
    halves.refresh()
    weight = network[4].weight
    assert isinstance(weight, nn.Parameter)
    trained = halves.half_of(weight).detach().clone()
    with average.swapped_in(network):
        assert len(find_stale(network, halves)) == 4 and halves.refresh() == 4
        assert not find_stale(network, halves)
        assert not torch.equal(halves.half_of(weight), trained)
    assert len(find_stale(network, halves)) == 4 and halves.refresh() == 4
    assert not find_stale(network, halves) and torch.equal(halves.half_of(weight), trained)


@pytest.mark.slow
def test_copies_follow_a_run_that_is_resumed() -> None:
    """Through the functions that load a checkpoint, and a plain step after it."""
    with open_world("cpu") as world:
        parts, other = (small_trainer(world, f"seed={seed}") for seed in (0, 1))
        network = parts.network
        halves = HalfWeights(network, torch.bfloat16, parts.optimizer)
        load_weights(network, other.network.state_dict(), source=Path("checkpoint"))
        assert len(find_stale(network, halves)) >= 8  # biases may be equal
        halves.refresh()
        assert not find_stale(network, halves)
        train_step(parts, [small_batch()], 0.1, 0)
        assert len(find_stale(network, halves)) >= 8
        halves.refresh()
        assert not find_stale(network, halves)


def test_norms_have_no_copy_and_copies_keep_the_layout() -> None:
    network = small_network()
    halves, _ = small_halves(network)
    conv, norm = network[0], network[1]
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNorm)
    assert halves.copy_of(norm.weight) is None and halves.half_of(norm.weight) is norm.weight
    half = halves.half_of(conv.weight)
    assert half.dtype == torch.bfloat16 and half.stride() == conv.weight.stride()


def forward(network: nn.Sequential, halves: HalfWeights | None, inputs: torch.Tensor) -> torch.Tensor:
    """The network with its copies, or under autocast."""
    if halves is None:
        with torch.autocast("cpu", torch.bfloat16):
            out: torch.Tensor = network(inputs)
        return out.float()
    conv, norm, _, _, last = network
    assert isinstance(conv, nn.Conv2d) and isinstance(last, nn.Linear)
    weight, bias = conv.weight, conv.bias
    assert bias is not None
    maps = nn.functional.conv2d(inputs.bfloat16(), halves.half_of(weight), halves.half_of(bias))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = torch.relu(norm(maps)).flatten(1)
    return linear(hidden, halves.half_of(last.weight), halves.half_of(last.bias)).float()


def test_gradients_by_copies_are_autocasts_to_the_bit() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, 3, 4, 4).to(memory_format=torch.channels_last)
    gradients = []
    for taken in (False, True):
        network = small_network()
        halves = small_halves(network)[0] if taken else None
        torch.autograd.backward(forward(network, halves, inputs).square().sum())
        gradients.append([p.grad for p in network.parameters()])
    for theirs, ours in zip(*gradients, strict=True):
        assert theirs is not None and ours is not None and theirs.abs().max() > 0
        assert torch.equal(ours, theirs)


def test_gradients_by_copies_pass_through_ddp_unchanged() -> None:
    torch.manual_seed(0)
    inputs, gradients = torch.randn(6, 3, 4, 4), []
    with open_world("cpu"):
        for taken in (False, True):
            network = small_network()
            halves = small_halves(network)[0] if taken else None
            parallel = DistributedDataParallel(Taking(network, halves), gradient_as_bucket_view=True)
            for _ in range(2):  # two passes are summed in float32
                torch.autograd.backward(parallel(inputs).square().sum())
            gradients.append([copy.deepcopy(p.grad) for p in network.parameters()])
    for theirs, ours in zip(*gradients, strict=True):
        assert theirs is not None and ours is not None and ours.dtype == torch.float32
        assert theirs.abs().max() > 0 and torch.equal(ours, theirs)


class Taking(nn.Module):
    """A network that computes as `forward` does, for DistributedDataParallel."""

    def __init__(self, network: nn.Sequential, halves: HalfWeights | None) -> None:
        super().__init__()
        self.network, self.halves = network, halves

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return forward(self.network, self.halves, inputs)
