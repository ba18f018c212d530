"""Batch normalisation over ranks and over ghost batches, against torch's own and against NumPy, in float64.

The ranks here are threads; `tests.train.distributed.test_norms` has processes.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from train.models.batch_norm import BatchNorm, ghost_sums_of, settle_ghosts, synchronize

# Shapes: N samples, C channels, H and W rows and columns.


class ThreadRanks:
    """Collectives of ranks that are threads."""

    def __init__(self, world_size: int) -> None:
        self.world_size, self.barrier = world_size, Barrier(world_size, timeout=60)
        self.sent: dict[int, Tensor] = {}

    def of(self, rank: int) -> Any:
        ranks = self

        class Rank:
            world_size = ranks.world_size

            def all_gather(self, tensor: Tensor) -> Tensor:
                ranks.sent[rank] = tensor.clone()
                ranks.barrier.wait()
                gathered = torch.stack([ranks.sent[number] for number in range(ranks.world_size)])
                ranks.barrier.wait()
                return gathered

            def all_reduce(self, *tensors: Tensor) -> None:
                for tensor in tensors:
                    tensor.copy_(self.all_gather(tensor).sum(0))

        return Rank()


def make_norm(ghost_batch: int | None = None) -> BatchNorm:
    norm = BatchNorm(4, ghost_batch).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.5, -0.5, 0.1, 2.0]))
        norm.bias.copy_(torch.tensor([0.0, 1.0, -2.0, 3.0]))
    return norm


def samples(num: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(num)
    return torch.randn(num, 4, *shape, generator=generator, dtype=torch.float64).mul(3).add(5).to(dtype)


@pytest.mark.parametrize("shape", [(), (3, 2)])
@pytest.mark.parametrize("shares", [[7], [4, 3], [5, 0, 2], [0, 1, 1]])
def test_ranks_compute_what_torch_does_with_all_samples(shape: tuple[int, ...], shares: list[int]) -> None:
    x, grad = samples(sum(shares), shape), samples(100, shape)[: sum(shares)]
    whole = make_norm()
    expected = nn.BatchNorm2d(4) if shape else nn.BatchNorm1d(4)
    expected.double().load_state_dict(whole.state_dict())
    x_all = x.clone().requires_grad_()
    out = expected(x_all)
    out.backward(grad)
    ranks = ThreadRanks(len(shares))

    def run(rank: int) -> tuple[Tensor, Tensor, BatchNorm]:
        norm = copy.deepcopy(whole)
        synchronize(norm, ranks.of(rank))
        start = sum(shares[:rank])
        own = x[start : start + shares[rank]].clone().requires_grad_()
        out_own = norm(own)
        out_own.backward(grad[start : start + shares[rank]])
        assert own.grad is not None
        return out_own.detach(), own.grad, norm

    with ThreadPoolExecutor(len(shares)) as threads:
        outs, grads, norms = zip(*threads.map(run, range(len(shares))), strict=True)
    torch.testing.assert_close(torch.cat(outs), out.detach())
    torch.testing.assert_close(torch.cat(grads), x_all.grad)
    for name, parameter in expected.named_parameters():
        summed = torch.stack([dict(norm.named_parameters())[name].grad for norm in norms]).sum(0)
        torch.testing.assert_close(summed, parameter.grad)
    for norm in norms:
        torch.testing.assert_close(norm.state_dict(), expected.state_dict())
        assert torch.equal(norm.running_var, norms[0].running_var)


def numpy_norm(
    x: np.ndarray[Any, Any], grad: np.ndarray[Any, Any], norm: BatchNorm
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Output, gradient and statistics of one ghost batch (N, C, H, W), by the formulas of the paper."""
    axes, shape = (0, 2, 3), (1, 4, 1, 1)
    weight, bias = (p.detach().numpy().reshape(shape) for p in (norm.weight, norm.bias))
    mean, deviation = x.mean(axes, keepdims=True), np.sqrt(x.var(axes, keepdims=True) + norm.eps)
    y = (x - mean) / deviation
    means = [value.mean(axes, keepdims=True) for value in (grad, grad * y)]
    dx = weight / deviation * (grad - means[0] - y * means[1])
    return y * weight + bias, dx, np.stack([mean.ravel(), x.var(axes, ddof=1)])


def test_ghost_batches_follow_the_papers_formulas() -> None:
    """Batches of 3, 3 and 1, of which the last counts like the others; in one pass or in two."""
    x, grad = samples(7, (3, 2)), samples(101, (3, 2))[:7]
    norm = make_norm(3)
    parts = [slice(0, 3), slice(3, 6), slice(6, 7)]
    found = [numpy_norm(x[p].numpy(), grad[p].numpy(), norm) for p in parts]
    outs, grads, statistics = (list(values) for values in zip(*found, strict=True))
    for passes in ([slice(0, 7)], [slice(0, 3), slice(3, 7)]):
        for one in passes:
            part = x[one].clone().requires_grad_()
            out = norm(part)
            out.backward(grad[one])
            np.testing.assert_allclose(out.detach().numpy(), np.concatenate(outs)[one], atol=1e-12)
            assert part.grad is not None
            np.testing.assert_allclose(part.grad.numpy(), np.concatenate(grads)[one], atol=1e-12)
    mean, variance = np.mean(statistics, axis=0)
    settle_ghosts(norm, ghost_sums_of(norm))  # once for the step, as if it were one of 6 ghost batches
    assert norm.running_mean is not None and norm.running_var is not None
    np.testing.assert_allclose(norm.running_mean.numpy(), 0.1 * mean, atol=1e-12)
    np.testing.assert_allclose(norm.running_var.numpy(), 0.9 + 0.1 * variance, atol=1e-12)
    assert norm.num_batches_tracked == 1 and norm.ghost_sums is not None and not norm.ghost_sums.any()
    norm.eval()
    plain = nn.BatchNorm2d(4).double().eval()
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), plain(x))


@pytest.mark.parametrize("ghost_batch", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_type_and_memory_format_of_images_stay(ghost_batch: int | None, dtype: torch.dtype) -> None:
    norm = make_norm(ghost_batch).float()
    synchronize(norm, ThreadRanks(1).of(0))
    x = samples(4, (3, 5), dtype).to(memory_format=torch.channels_last).requires_grad_()
    out = norm(x)
    out.backward(torch.ones_like(out))
    assert x.grad is not None and norm.weight.grad is not None
    assert out.dtype == x.grad.dtype == dtype and norm.weight.grad.dtype == torch.float32
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (out, x.grad))
    exact = make_norm(ghost_batch)
    torch.testing.assert_close(out.double(), exact(x.detach().double()), rtol=0.01, atol=0.02)
