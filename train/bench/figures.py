"""What the rounds of `alexnet bench train` amount to: a row for each case, and the ratios."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from train.bench import harness
from train.bench.flops import flops_of
from train.bench.harness import Ratios, four_digits, median_ratio
from train.bench.subjects import TORCHVISION, StepSpec
from train.graphs.verdict import PLAIN

PHASES = ("step", "loader", "end_to_end")
FIGURES = {
    "gflop_per_image": ("GFLOP/image", ">13.2f"), "operators": ("operators", ">11.0f"),
    "launches": ("launches", ">10.0f"), "kernels": ("kernels", ">9.0f"), "kernel_ms": ("kernel ms", ">11.2f"),
    "choice_s": ("choice s", ">10.1f"), "first_step_s": ("first step s", ">14.1f"),
    "peak_memory_mb": ("MB", ">8.0f"),
}  # fmt: skip
"""Of a row beside its phases, with heading and format."""


@dataclass
class Measured:
    """Results of the rounds.

    Attributes:
        seconds: for one batch in each round, by case and phase; `fed_step` is the step alone, measured again
            beside `loader` and `end_to_end`.
        gemm_gflops: the best matrix product by precision, in 1e9 operations a second.
        lrn_s: the best time of LRN alone, forward and backward, by memory format and form.
        figures: a case's other figures, keys of `FIGURES`.
        choices: of ours, `step` and `why` of the trainer's choice: the step that was measured.
        failures: why a case ended early; phases that lack a round are forgotten.
    """

    crop_px: int
    seconds: defaultdict[tuple[StepSpec, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    gemm_gflops: dict[str, float] = field(default_factory=dict)
    lrn_s: dict[str, dict[str, float]] = field(default_factory=dict)
    figures: defaultdict[StepSpec, dict[str, float | None]] = field(default_factory=lambda: defaultdict(dict))
    choices: dict[StepSpec, dict[str, str]] = field(default_factory=dict)
    failures: dict[StepSpec | str, str] = field(default_factory=dict)


def make_phases(spec: StepSpec, measured: Measured) -> dict[str, dict[str, Any]]:
    """Return rates by phase; `mfu` compares the best round with the best matrix product."""
    phases = {}
    for phase in PHASES:
        if (spec, phase) in measured.seconds:
            rates = [spec.batch / value for value in measured.seconds[spec, phase]]
            work = flops_of(spec, measured.crop_px)
            mfu = max(rates) * work / measured.gemm_gflops[spec.precision or "fp32"] / 1e9
            rate = harness.rate(rates)
            phases[phase] = {
                "images_per_s": rate["images_per_s"],
                "mfu": None if phase == "loader" else four_digits(mfu),
                "rounds": rate["rounds"],
            }
    return phases


def make_row(spec: StepSpec, measured: Measured) -> dict[str, Any]:
    """Return all that is known of a case: its figures, or why it has none."""
    found = {
        name: None if value is None else four_digits(value) for name, value in measured.figures[spec].items()
    }
    choice = measured.choices.get(spec, {"step": None, "why": None})
    phases, failure = make_phases(spec, measured), measured.failures.get(spec)
    return {
        "subject": spec,
        **choice,
        "phases": phases,
        **dict.fromkeys(FIGURES),
        **found,
        "failure": failure,
    }


def takes_plain(spec: StepSpec | None, measured: Measured) -> bool:
    """Return whether a case was measured by the plain step."""
    return spec in measured.choices and measured.choices[spec]["step"] == PLAIN


def make_ratios(specs: Sequence[StepSpec], measured: Measured) -> tuple[Ratios, list[str]]:
    """Return the promised ratios, and the notes on them.

    Those of the first batch have plain names; of another there are six, with its size at the end.
    """
    ratios: Ratios = {}
    notes: list[str] = []
    reasons: dict[str, str] = {}
    for batch in dict.fromkeys(spec.batch for spec in specs):
        of_batch = {spec.subject: spec for spec in specs if spec.batch == batch}
        step_s = {name: measured.seconds.get((spec, "step")) for name, spec in of_batch.items()}
        owt_s, paper_s = step_s.get("owt"), step_s.get("paper")
        plain_s, runs_plain = step_s.get("owt_plain"), takes_plain(of_batch.get("owt"), measured)
        ways = {way.subject: median_ratio(step_s.get(way.subject), owt_s) for way in TORCHVISION}
        known = {name: ratio for name, ratio in ways.items() if ratio is not None}
        best = min(known, key=known.__getitem__, default="")
        end = f"_at_{batch}" if ratios else ""
        ratios |= {
            f"owt_vs_best_torchvision{end}": known.get(best),
            f"owt_mfu{end}": make_phases(of_batch["owt"], measured)["step"]["mfu"] if owt_s else None,
            f"paper_vs_no_lrn{end}": median_ratio(step_s.get("paper_no_lrn"), paper_s),
            f"bn_vs_no_norm{end}": median_ratio(step_s.get("bn_no_norm"), step_s.get("bn")),
            f"owt_fast_vs_plain{end}": None if runs_plain else median_ratio(plain_s, owt_s),
            f"owt_deterministic_vs_owt{end}": median_ratio(owt_s, step_s.get("owt_deterministic")),
        }
        if runs_plain:
            reasons[f"owt_fast_vs_plain{end}"] = "owt runs by the plain step itself"
        if best:
            notes.append(f"owt_vs_best_torchvision{end}: {best} is the best of {', '.join(known)}")
        if not end:
            ratios["owt_vs_torchvision_reference"] = ways["torchvision_fp32"]
            ratios["paper_vs_torch_lrn"] = ratio = median_ratio(step_s.get("paper_torch_lrn"), paper_s)
            notes += ["paper_vs_torch_lrn: against the same net in float32"] * bool(ratio)
    for form in ("eager", "fused"):
        found = (best["torch"] / best[form] for best in measured.lrn_s.values())
        ratios[f"lrn_{form}_vs_torch"] = min(found, default=None)
    of = measured.seconds
    fed = [
        median_ratio([*map(max, of[spec, "fed_step"], of[spec, "loader"])], of[spec, "end_to_end"])
        for spec in specs
        if (spec, "end_to_end") in of
    ]
    ratios["end_to_end_vs_slowest_part"] = worst = min(filter(None, fed), default=None)
    notes += ["lrn_*: the worse memory format"] * bool(measured.lrn_s)
    if worst:
        notes.append("end_to_end_vs_slowest_part: the worst network; loader and steps share the cores")
    rounded, missing = harness.round_ratios(ratios, others=reasons)
    return rounded, [*missing, *notes]
