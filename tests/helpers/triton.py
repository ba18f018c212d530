"""Triton without a GPU: its kernels run on CPU tensors by Triton's interpreter, and compiled for a card.

Both work in the test's own process, without `TRITON_INTERPRET`, which Triton reads when it is imported:

    with interpreted(stem_triton):             # the modules whose kernels run
        stem_triton.fill_inputs(...)           # the launcher, with CPU tensors of tiny shapes

    resources = compile_for(stem_triton.kernel, {"out": "*bf16"}, {"BLOCK": 128}, capability=90)
    assert resources.spill_bytes == 0

The interpreter cuts float32 off where a card rounds to bfloat16 (`cvt.rn` in the PTX): a unit of difference.

Import Triton, and modules with kernels, inside of the tests: `needs_triton` skips them where there is none.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest

CAPABILITIES = (80, 90)
"""Compute capabilities, times ten, that kernels are compiled for: A100, and H100 or H200."""

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with torch for CUDA"
)


@contextmanager
def interpreted(*modules: ModuleType) -> Iterator[None]:
    """Let launches of the modules' `@triton.jit` functions run on CPU tensors, by Triton's interpreter.

    A program of the grid takes about 10 ms: use tiny shapes. What the interpreter replaces in
    `triton.language` is put back, so that the same process can compile kernels afterwards.

    Args:
        modules: with the kernels and all functions of ours that they call.
    """
    import_module("triton.experimental.gluon")  # the first launch would, and it wants what is replaced here
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    language = (tl, tl.core, tl.math, tl.standard, tl.tensor, tl.core.tensor_descriptor_base)
    before = [(place, dict(vars(place))) for place in (*language, *modules)]
    try:
        for place, names in before:
            for name, value in names.items():
                if isinstance(value, JITFunction):
                    setattr(place, name, InterpretedFunction(value.fn))
        yield
    finally:
        InterpretedFunction.rewritten_fn.clear()  # they look up what is taken away here
        for place, names in before:
            for name, value in dict(vars(place)).items():
                if name not in names:
                    delattr(place, name)
                elif value is not names[name]:
                    setattr(place, name, names[name])


@dataclass(frozen=True)
class Resources:
    """Resources of a compiled kernel.

    Attributes:
        registers: of a thread, up to 255.
        spill_bytes: stored to and loaded from local memory for want of registers, in a thread's code.
        shared_bytes: of shared memory, in a program.
        ptx: the code for the assembler.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    capability: int,
    num_warps: int = 4,
    **options: Any,
) -> Resources:
    """Compile a kernel for a card that need not be there, and ask the assembler what it takes.

    Args:
        kernel: a `@triton.jit` function, outside of `interpreted`.
        signature: type of each argument that is not constant: "*fp32", "*bf16", "*u8", "i32", "fp32", ...
            Pointers are taken to be aligned to 16 bytes, as torch's allocations are; "i32:16" is a number
            that 16 divides, which Triton notices at a launch.
        constexprs: the value of each that is; None for a pointer that is not given.
        capability: of `CAPABILITIES`.
        options: of the launch, such as `enable_fp_fusion`.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    assert set(names) == {*signature, *constexprs}, set(names) ^ {*signature, *constexprs}
    types = {name: signature.get(name, "constexpr").removesuffix(":16") for name in names}
    multiples = [name for name, kind in signature.items() if kind[0] == "*" or kind.endswith(":16")]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in multiples}
    source = ASTSource(kernel, signature=types, constexprs=dict(constexprs), attrs=aligned)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps, **options}
    )
    ptx = compiled.asm["ptx"]
    target = re.search(r"^\.target (\w+)", ptx, flags=re.MULTILINE)
    assert target is not None
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx, encoding="utf-8")
        command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target[1]}", str(file), "-o", f"{file}.o"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    numbers = [re.search(pattern, said) for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")]
    assert numbers[0] is not None and numbers[1] is not None, said
    return Resources(int(numbers[0][1]), int(numbers[1][1]), compiled.metadata.shared, ptx)
