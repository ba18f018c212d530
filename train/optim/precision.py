"""The number format of the forward pass, and the loss scaler that float16 needs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

from data_pipeline.common.errors import UserError

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A resolved number format; `reason` explains the choice in the log."""

    name: Literal["fp32", "bf16", "fp16"]
    device_type: str
    reason: str

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context for a forward pass: matrix products in this format, sums and norms in float32."""
        return torch.autocast(self.device_type, TYPES[self.name], enabled=self.name != "fp32")

    def make_scaler(self) -> torch.amp.GradScaler:
        """Build the loss scaler for float16's narrow range; disabled for the other formats."""
        return torch.amp.GradScaler(self.device_type, enabled=self.name == "fp16")


def has_bf16(device: torch.device) -> bool:
    """Return whether bfloat16 arithmetic is native on a device, not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_precision(wanted: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
    """Resolve `auto`, and refuse formats that the device does not have.

    Raises:
        UserError: float16 on a CPU, or bfloat16 on a GPU without it.
    """
    if wanted == "auto":
        if has_bf16(device):
            return Precision("bf16", device.type, "the hardware has bfloat16")
        if device.type == "cuda":
            return Precision("fp16", device.type, "this GPU has no bfloat16; float16 with loss scaling")
        return Precision("fp32", device.type, "this CPU has no bfloat16 arithmetic")
    if wanted == "fp16" and device.type == "cpu":
        raise UserError("precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    if wanted == "bf16" and device.type == "cuda" and not has_bf16(device):
        raise UserError("precision bf16 is only emulated on this GPU; use fp16 or fp32")
    return Precision(wanted, device.type, "asked for")
