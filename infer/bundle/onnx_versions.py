"""Which versions of ONNX Runtime load a file, by its opset and its IR version.

Measured with wheels of ONNX Runtime 1.11 to 1.17. Its docs/Versioning.md says the same, except that it
claims opset 19 for 1.15, whose CPU provider has no `Cast` of opset 19.
"""

from __future__ import annotations

from infer.bundle.schema import PrecisionCheck

OPSET_SINCE = {17: "1.12", 18: "1.14", 19: "1.16", 20: "1.17", 21: "1.18"}
IR_SINCE = {8: "1.12", 9: "1.15", 10: "1.18"}
"""IR 8 is older than 1.12, the first that has any opset of ours."""


def runtime_words(check: PrecisionCheck) -> str | None:
    """`ONNX Runtime 1.17 or later (opset 20, IR 9)`; None for versions that are not ours."""
    if check.opset not in OPSET_SINCE or check.ir_version not in IR_SINCE:
        return None
    since = max(OPSET_SINCE[check.opset], IR_SINCE[check.ir_version])
    return f"ONNX Runtime {since} or later (opset {check.opset}, IR {check.ir_version})"
