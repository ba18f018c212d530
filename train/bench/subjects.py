"""The subjects of `alexnet bench train`: torchvision's `alexnet` in five ways, and our networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from train.bench.harness import log

PrecisionName = Literal["fp32", "bf16", "fp16"]


class StepSpec(msgspec.Struct, frozen=True):
    """One network and the way to train it.

    Attributes:
        subject: the name by which it is chosen.
        network: one of ours, or `torchvision`: its `alexnet`.
        precision: in `SUBJECTS` None for the one that is asked for.
        compiled: Inductor's mode for the network as a whole; empty for none.
        norm: the network's own, nn.LocalResponseNorm in float32 (`torch`), or nn.Identity in its place.
        tuned: of torchvision's, whether in channels_last and with the fused optimiser.
        fused, deterministic: of ours, the keys of its configuration.
        batch: samples of a step.
    """

    subject: str
    network: str
    precision: PrecisionName | None = None
    compiled: Literal["", "default", "reduce-overhead"] = ""
    norm: Literal["own", "torch", "none"] = "own"
    tuned: bool = False
    fused: Literal["auto", "off"] = "auto"
    deterministic: bool = False
    batch: int = 0

    def __str__(self) -> str:
        return f"{self.subject} {self.precision} batch {self.batch}"


NETWORKS = ("owt", "paper", "bn", "caffe")
TORCHVISION = (
    StepSpec("torchvision_fp32", "torchvision", "fp32"),
    StepSpec("torchvision_amp", "torchvision", "fp16"),
    StepSpec("torchvision_bf16", "torchvision", "bf16", tuned=True),
    StepSpec("torchvision_compiled", "torchvision", "bf16", "default", tuned=True),
    StepSpec("torchvision_graphs", "torchvision", "bf16", "reduce-overhead", tuned=True),
)
SUBJECTS = (
    *TORCHVISION,
    *(StepSpec(name, name) for name in NETWORKS),
    StepSpec("paper_no_lrn", "paper", norm="none"),
    StepSpec("paper_torch_lrn", "paper", "fp32", norm="torch"),
    StepSpec("bn_no_norm", "bn", norm="none"),
    StepSpec("owt_plain", "owt", fused="off"),
    StepSpec("owt_deterministic", "owt", deterministic=True),
    *(StepSpec(f"{name}_compiled", name, compiled="default") for name in NETWORKS),
)
OTHERS = ("lrn", "end_to_end")  # the first LRN of `paper` by itself; our networks fed by the loader
DEFAULT: dict[str, tuple[str, ...]] = {
    "cpu": (
        "torchvision_fp32", "torchvision_bf16", "owt", "paper", "paper_no_lrn", "paper_torch_lrn", *OTHERS,
    ),
    "cuda": (*(spec.subject for spec in SUBJECTS[:14] if spec.subject != "caffe"), *OTHERS),
}  # fmt: skip
"""Subjects measured by default: on a CPU, those that take ten minutes on two cores."""


def make_specs(
    only: Sequence[str], batches: Sequence[int], precision: PrecisionName, device: str
) -> list[StepSpec]:
    """List the cases: each subject at each batch, in this precision if it has none of its own.

    torch's LRN is for a ratio of the first batch, and measured at that one. On a CPU `--amp` is bfloat16, and
    nothing is captured in graphs.
    """
    specs = []
    for batch in dict.fromkeys(batches):
        for known in (spec for spec in SUBJECTS if spec.subject in only):
            if known.compiled == "reduce-overhead" and device == "cpu":
                log.warning(f"{known.subject} is left out: it needs a GPU")
            elif known.norm != "torch" or batch == batches[0]:
                own = "bf16" if known.precision == "fp16" and device == "cpu" else known.precision
                specs.append(msgspec.structs.replace(known, batch=batch, precision=own or precision))
    return specs
