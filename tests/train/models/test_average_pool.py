"""Average pooling whose gradient repeats its bits: torch's numbers, on a CPU to the bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from train.distributed.numerics import repeated_bits
from train.models.average_pool import AveragePool


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def pooled(pool: nn.Module, maps: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = maps.clone(memory_format=torch.preserve_format).requires_grad_()
    out = pool(leaf)
    out.backward(grad)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("side", [6, 7, 8, 13])
def test_gradient_that_repeats_is_torchs(
    side: int, memory_format: torch.memory_format, kind: torch.dtype, device: str
) -> None:
    torch.manual_seed(side)
    maps = torch.randn(3, 5, side, side + side % 2).to(device, kind).contiguous(memory_format=memory_format)
    grad = torch.randn(3, 5, 6, 6).to(device, kind).contiguous(memory_format=memory_format)
    want = pooled(nn.AdaptiveAvgPool2d((6, 6)), maps, grad)
    with repeated_bits(True):
        found, again = (pooled(AveragePool((6, 6)), maps, grad) for _ in range(2))
    for ours, twice, theirs in zip(found, again, want, strict=True):
        assert torch.equal(ours, twice)
        assert ours.is_contiguous(memory_format=memory_format)
        if device == "cpu":
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs)
    assert want[1].abs().max() > 0.1
