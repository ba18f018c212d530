"""The two forms that every kernel has."""

from __future__ import annotations

from typing import Literal

Implementation = Literal["plain", "triton"]
"""Plain torch, on any device and the reference, or a kernel of Triton's, on a GPU (or interpreted)."""
