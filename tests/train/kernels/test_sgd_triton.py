"""The optimiser's kernel against its plain form: interpreted, compiled, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.plain_kernels import PLAIN
from tests.helpers.triton import CAPABILITIES, compile_for, interpreted, needs_triton
from train.kernels.interface import Kernels, SgdForm, triton_kernels

pytestmark = [needs_triton, pytest.mark.slow]  # the interpreter, and compilations for every GPU
FORMS = {
    "torch": SgdForm(0.9, 5e-4),
    "nesterov": SgdForm(0.9, 5e-4, nesterov=True),
    "paper": SgdForm(0.9, 5e-4, lr_in_velocity=True),
    "paper, nesterov": SgdForm(0.9, 5e-4, nesterov=True, lr_in_velocity=True),
    "no momentum": SgdForm(0.0, 0.01),
}
STEPS, SKIPPED = 10, 4


def run(
    kernels: Kernels,
    form: SgdForm,
    half_type: torch.dtype | None,
    ratio: float | None,
    device: str = "cpu",
    size: int = 15,  # with 75 weights each, a block of the kernel and a part of the next
) -> dict[str, torch.Tensor]:
    """Ten steps at changing rates, one of them skipped for a gradient of NaN."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(size, 3, 5, 5, generator=random).to(device, memory_format=torch.channels_last)
    velocity = torch.zeros_like(weight) if form.momentum else None
    half = None if half_type is None else weight.to(half_type)
    for step in range(STEPS):
        gradient = torch.randn(weight.shape, generator=random).to(device, memory_format=torch.channels_last)
        if step == SKIPPED:
            gradient.fill_(torch.nan)
        rate, skip = (
            torch.tensor(0.1 / (1 + step)).to(device),
            torch.tensor(float(step == SKIPPED)).to(device),
        )
        ratios = None if ratio is None else torch.tensor(ratio).to(device)
        kernels.update_parameter(weight, velocity, gradient, rate, skip, form, ratios, half)
    results = {"weight": weight, "velocity": velocity, "half": half}
    return {name: tensor for name, tensor in results.items() if tensor is not None}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize(("half_type", "ratio"), [(torch.float16, None), (torch.bfloat16, 0.3), (None, None)])
def test_update_kernel_is_the_plain_form_to_the_bit(
    name: str, half_type: torch.dtype | None, ratio: float | None
) -> None:
    from train.kernels import sgd_triton

    plain = run(PLAIN, FORMS[name], half_type, ratio)
    with interpreted(sgd_triton):
        ours = run(triton_kernels(), FORMS[name], half_type, ratio)
    assert ours.keys() == plain.keys() and ours["weight"].isfinite().all()
    for key, tensor in plain.items():
        if tensor.dtype == torch.bfloat16:  # the interpreter cuts off
            torch.testing.assert_close(ours[key], tensor, rtol=2**-7, atol=0)
        else:
            assert torch.equal(ours[key], tensor), key


def test_update_kernel_counts_as_a_change_of_its_tensors() -> None:
    from train.kernels import sgd_triton

    weight, half = torch.zeros(4), torch.zeros(4).half()
    before = weight._version, half._version
    with interpreted(sgd_triton):
        rate, skip = torch.tensor(0.5), torch.tensor(0.0)
        sgd_triton.update_parameter(weight, None, torch.ones(4), rate, skip, SgdForm(0.0), half=half)
    assert weight.tolist() == half.tolist() == [-0.5] * 4
    assert weight._version > before[0] and half._version > before[1]


def test_gradient_of_another_layout_is_refused() -> None:
    from train.kernels import sgd_triton

    weight = torch.zeros(4, 3, 5, 5)
    gradient = torch.ones_like(weight).to(memory_format=torch.channels_last)
    with pytest.raises(AssertionError, match="own layout"):
        sgd_triton.update_parameter(
            weight, None, gradient, torch.tensor(1.0), torch.tensor(0.0), SgdForm(0.0)
        )


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("name", "kind"), [("torch", "bf16"), ("paper, nesterov", "fp16")])
def test_update_kernel_compiles_without_spills(name: str, kind: str, capability: int) -> None:
    from train.kernels import sgd_triton

    read = ("weight", "velocity", "gradient", "rate", "ratio", "skip")
    pointers = {**dict.fromkeys((f"{name}_ptr" for name in read), "*fp32"), "half_ptr": f"*{kind}"}
    numbers = {"size": "i32:16", "momentum": "fp32", "weight_decay": "fp32"}
    constants = {
        "NESTEROV": FORMS[name].nesterov,
        "LR_IN_VELOCITY": FORMS[name].lr_in_velocity,
        "BLOCK": sgd_triton.BLOCK,
    }
    resources = compile_for(
        sgd_triton.sgd_kernel, pointers | numbers, constants, capability=capability, **sgd_triton.OPTIONS
    )
    assert resources.spill_bytes == 0 and resources.registers <= 64
    assert "fma" not in resources.ptx and "ld.global.v4.b32" in resources.ptx  # 16 bytes at a time
    assert ("cvt.rn.bf16" in resources.ptx) == (kind == "bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMS)
def test_update_kernel_on_a_gpu_is_the_plain_form_to_the_bit(name: str) -> None:
    for ratio in (None, 0.3):
        results = [
            run(kind, FORMS[name], torch.bfloat16, ratio, "cuda", 4099) for kind in (PLAIN, triton_kernels())
        ]
        for key, tensor in results[0].items():
            assert torch.equal(results[1][key], tensor), (key, ratio)
