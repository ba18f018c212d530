"""One parameter's update against torch's fused SGD; all forms: `tests/train/compile/test_update.py`."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.plain_kernels import update_parameter
from train.kernels.interface import SgdForm

STEPS, SKIPPED = 10, 4


@pytest.mark.parametrize(
    "form",
    [SgdForm(0.9, 5e-4), SgdForm(0.9, 5e-4, nesterov=True), SgdForm(0.0, 0.01), SgdForm(0.5)],
    ids=["decay", "nesterov", "no momentum", "no decay"],
)
def test_plain_update_is_torchs_fused_sgd(form: SgdForm) -> None:
    """Ten steps at changing rates, one of them skipped for a gradient of NaN."""
    torch.manual_seed(0)
    weight = torch.randn(7, 3, 5, 5).to(memory_format=torch.channels_last)
    theirs = weight.clone().requires_grad_()
    optimizer = torch.optim.SGD(
        [theirs],
        lr=0.1,
        momentum=form.momentum,
        weight_decay=form.weight_decay,
        nesterov=form.nesterov,
        fused=True,
    )
    velocity = torch.zeros_like(weight) if form.momentum else None
    half, start = torch.empty_like(weight, dtype=torch.bfloat16), weight.clone()
    for step in range(STEPS):
        rate, gradient = 0.1 / (1 + step), torch.randn_like(weight)
        if step == SKIPPED:
            gradient.fill_(torch.nan)
        skip = torch.tensor(float(step == SKIPPED))
        before = weight.clone()
        update_parameter(weight, velocity, gradient, torch.tensor(rate), skip, form, half=half)
        assert torch.equal(weight, before) == (step == SKIPPED)
        assert torch.equal(half, weight.bfloat16())
        theirs.grad, optimizer.param_groups[0]["lr"] = gradient, rate
        optimizer.found_inf, optimizer.grad_scale = skip, None  # type: ignore[attr-defined]
        optimizer.step()
        torch.testing.assert_close(weight, theirs.detach(), rtol=1e-6, atol=1e-6)
    assert (weight - start).abs().mean() > 0.05
    if velocity is not None:
        torch.testing.assert_close(velocity, optimizer.state[theirs]["momentum_buffer"], rtol=1e-6, atol=1e-6)
