"""The kernel of the first convolution's inputs against its plain form: interpreted, compiled, on a GPU."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.helpers.plain_kernels import s2d_inputs
from tests.helpers.stem_samples import ERASED, MIX, PREPROCESSING, mix_on_device, uint8_images
from tests.helpers.triton import CAPABILITIES, compile_for, interpreted, needs_triton
from train.kernels.interface import triton_kernels
from train.kernels.stem import BlockShape, s2d_shape
from train.models.alexnet import Normalize

pytestmark = [needs_triton, pytest.mark.slow]  # the interpreter, and compilations for every GPU
POINTERS = {"images_ptr": "*u8", "scale_ptr": "*fp32", "shift_ptr": "*fp32"}
PLAN = {"erase_ptr": "*i64", "partners_ptr": "*i64", "weights_ptr": "*fp32", "boxes_ptr": "*i64"}
# crops that leave pixels over, and crops that need more padding behind; with and without channels of zeros
SHAPES = [s2d_shape(12, 11, 4, 2), s2d_shape(13, 5, 3, 0), s2d_shape(10, 3, 2, 1), s2d_shape(9, 7, 4, 5)]


def both(
    shape: BlockShape, dtype: torch.dtype, erased: bool, mixed: bool, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The plain form's inputs and the kernel's."""
    images, normalize = uint8_images(4, shape.crop_px).to(device), Normalize(PREPROCESSING).to(device)
    erase_N4 = torch.from_numpy(ERASED).to(device) if erased else None
    mix = mix_on_device(MIX, device) if mixed else None
    arguments = images, normalize.scale, normalize.shift, shape, dtype, erase_N4, mix
    return s2d_inputs(*arguments), triton_kernels().s2d_inputs(*arguments)


def check_both(plain: Tensor, ours: Tensor, mixed: bool) -> None:
    """Equal to the bit where nothing is mixed; else to a unit of the largest.

    In half types to a unit of their own: the interpreter does not round to bfloat16, and a mixed value may
    lie between two.
    """
    assert ours.shape == plain.shape and ours.dtype == plain.dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    largest = float(plain.abs().max())
    assert largest > 1 and plain.eq(0).any()
    cut_off = plain.device.type == "cpu" and plain.dtype == torch.bfloat16
    if mixed or cut_off:
        unit, float32 = torch.finfo(plain.dtype).eps, torch.finfo(torch.float32).eps
        torch.testing.assert_close(ours, plain, rtol=unit, atol=largest * float32)
    else:
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("erased", "mixed"), list(itertools.product([False, True], repeat=2)))
def test_input_kernel_gives_the_plain_forms_values(erased: bool, mixed: bool, dtype: torch.dtype) -> None:
    from train.kernels import stem_triton

    with interpreted(stem_triton):  # once, because it reads the kernel anew each time
        results = [both(shape, dtype, erased, mixed) for shape in SHAPES]
    for plain, ours in results:
        check_both(plain, ours, mixed)


def test_input_kernel_would_show_a_wrong_mix() -> None:
    """The comparison fails where a sample is mixed with itself."""
    from train.kernels import stem_triton

    images, normalize = uint8_images(4, 12), Normalize(PREPROCESSING)
    arguments = images, normalize.scale, normalize.shift, SHAPES[0], torch.float32
    plain = s2d_inputs(*arguments, mix=mix_on_device(MIX))
    wrong = replace(mix_on_device(MIX), partners=torch.arange(4))
    with interpreted(stem_triton), pytest.raises(AssertionError, match="Mismatched elements"):
        check_both(plain, stem_triton.s2d_inputs(*arguments, mix=wrong), True)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kind", ["bf16", "fp32"])
@pytest.mark.parametrize("planned", [False, True])
def test_input_kernel_compiles_without_spills(planned: bool, kind: str, capability: int) -> None:
    from train.kernels import stem_triton

    signature = {**POINTERS, "out_ptr": f"*{kind}"}
    constants = stem_triton.constants_of(s2d_shape(224, 11, 4, 2))
    if planned:
        signature |= PLAN
    else:
        constants |= dict.fromkeys(PLAN)
    resources = compile_for(
        stem_triton.input_kernel, signature, constants, capability=capability, **stem_triton.OPTIONS
    )
    assert resources.spill_bytes == 0 and resources.registers <= 64
    assert "fma" not in resources.ptx and f"st.global.v{2 if kind == 'bf16' else 4}.b32" in resources.ptx
    assert ("cvt.rn.bf16" in resources.ptx) == (kind == "bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_input_kernel_on_a_gpu_gives_the_plain_forms_values(dtype: torch.dtype) -> None:
    for shape in (s2d_shape(224, 11, 4, 2), s2d_shape(56, 5, 2, 2), s2d_shape(227, 7, 3, 0)):
        for mixed in (False, True):
            check_both(*both(shape, dtype, True, mixed, device="cuda"), mixed)
