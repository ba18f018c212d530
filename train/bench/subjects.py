"""The subjects of `alexnet bench train`: torchvision's `alexnet` in five ways, and our networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from train.bench.harness import log

PrecisionName = Literal["fp32", "bf16", "fp16"]


class StepSpec(Struct, frozen=True):
    """One network and the way to train it."""

    subject: str  # the name by which it is chosen
    network: str  # one of ours, or `torchvision`: its `alexnet`
    precision: PrecisionName | None = None  # in `SUBJECTS` None for the one that is asked for
    compiled: Literal["", "default", "reduce-overhead"] = ""  # Inductor's mode for the network as a whole
    norm: Literal["own", "torch", "none"] = "own"  # nn.LocalResponseNorm or nn.Identity in its place
    tuned: bool = False  # of torchvision's: in channels_last and with the fused optimiser
    keys: tuple[str, ...] = ()  # of ours: of its configuration
    batch: int = 0  # samples of a step

    def __str__(self) -> str:
        return f"{self.subject} {self.precision} batch {self.batch}"


NETWORKS = ("owt", "paper", "bn", "caffe")
SUBJECTS = (
    StepSpec("torchvision_fp32", "torchvision", "fp32"),
    StepSpec("torchvision_amp", "torchvision", "fp16"),
    StepSpec("torchvision_bf16", "torchvision", "bf16", tuned=True),
    StepSpec("torchvision_compiled", "torchvision", "bf16", "default", tuned=True),
    StepSpec("torchvision_graphs", "torchvision", "bf16", "reduce-overhead", tuned=True),
    *(StepSpec(name, name) for name in NETWORKS),
    StepSpec("paper_no_lrn", "paper", norm="none"),
    StepSpec("paper_torch_lrn", "paper", "fp32", norm="torch"),
    StepSpec("bn_no_norm", "bn", norm="none"),
    StepSpec("owt_plain", "owt", keys=("fused=off",)),
    StepSpec("owt_deterministic", "owt", keys=("deterministic=true",)),
    *(StepSpec(f"{name}_compiled", name, compiled="default") for name in NETWORKS),
)
OTHERS = ("lrn", "end_to_end")  # the first LRN of `paper` by itself; our networks fed by the loader
DEFAULT: dict[str, tuple[str, ...]] = {  # on a CPU, those that take ten minutes on two cores
    "cpu": (
        "torchvision_fp32", "torchvision_bf16", "owt", "paper", "paper_no_lrn", "paper_torch_lrn", *OTHERS,
    ),
    "cuda": (*(spec.subject for spec in SUBJECTS[:14] if spec.subject != "caffe"), *OTHERS),
}  # fmt: skip


def make_specs(
    only: Sequence[str], batches: Sequence[int], precision: PrecisionName, device: str
) -> list[StepSpec]:
    """List the cases: each subject at each batch, in this precision if it has none of its own.

    torch's LRN is measured at the first batch alone. On a CPU `--amp` is bfloat16, and nothing is captured.
    """
    specs = []
    for batch in dict.fromkeys(batches):
        for known in (spec for spec in SUBJECTS if spec.subject in only):
            if known.compiled == "reduce-overhead" and device == "cpu":
                log.warning(f"{known.subject} is left out: it needs a GPU")
            elif known.norm != "torch" or batch == batches[0]:
                own = "bf16" if known.precision == "fp16" and device == "cpu" else known.precision
                specs.append(replace(known, batch=batch, precision=own or precision))
    return specs
