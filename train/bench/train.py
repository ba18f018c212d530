"""`alexnet bench train`: images/s of training, as a share of the arithmetic peak (MFU), and torchvision's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch

from data_pipeline.common.errors import UserError
from train.bench.harness import Bench, Report, machine_name, median_ratio
from train.bench.images import write_bench_images
from train.bench.subjects import DEFAULT, NETWORKS, PrecisionName, StepSpec, make_specs
from train.bench.trainer import LAYOUTS, Device, PartsCase, StepCase, gemm_parts, gflop_of, lrn_parts
from train.distributed.world import choose_device
from train.graphs.verdict import PLAIN
from train.optim.precision import choose_precision

LIMITS_S = {"cpu": (None, None), "cuda": (60, 180)}  # of a subject; of building ours, which is proved
BATCHES = {"cpu": (128,), "cuda": (128, 1024)}
STEPS = {"cpu": (2, 0), "cuda": (40, 10)}  # timed in each round, and run before them
FED_STEPS = {"cpu": 4, "cuda": 40}


def bench_train(
    *, only: Sequence[str], batches: Sequence[int], precision: Literal["auto", PrecisionName],
    num_rounds: int, crop_px: int, folder: Path | None, images: int, device: Literal["auto", "cpu", "cuda"],
) -> Report:  # fmt: skip
    """Measure training; the options are those of the command. Raises UserError for too few images."""
    kind = choose_device(device)
    only, batches, photos = only or DEFAULT[kind], batches or BATCHES[kind], None
    if "end_to_end" in only:
        if images < batches[0]:
            raise UserError(f"num_images must be at least the first batch, {batches[0]}, not {images}")
        photos = write_bench_images(folder, images)
    specs = make_specs(only, batches, choose_precision(precision, torch.device(kind)).name, kind)
    bench, layouts, size = Bench(), LAYOUTS if "lrn" in only else (), min(batches[0], 64)
    lrn = {f"lrn {name}": (PartsCase, kind, lrn_parts, name, size, crop_px) for name in layouts}
    names = dict.fromkeys([*lrn, *map(str, specs)])
    for batch in dict.fromkeys(batches):  # one after the other: all at once would not fit on a GPU
        of_batch = {str(spec): spec for spec in specs if spec.batch == batch}
        precisions = dict.fromkeys(spec.precision for spec in of_batch.values())
        gemms = {f"gemm {p} batch {batch}": (PartsCase, kind, gemm_parts, p) for p in precisions}
        measure_batch(bench, of_batch, {**gemms, **lrn}, num_rounds, crop_px, photos, kind)
        lrn, photos = {}, None  # at the first batch alone
    peaks = note_mfu(bench, specs, crop_px)
    settings = {"machine": machine_name(kind), "crop_px": crop_px, "gemm_gflops": peaks}
    return bench.report(settings, names | bench.failures, *make_ratios(bench, specs))


def measure_batch(
    bench: Bench, specs: Mapping[str, StepSpec], parts: Mapping[str, tuple[Any, ...]], num_rounds: int,
    crop_px: int, photos: Path | None, device: Device,
) -> None:  # fmt: skip
    """Measure steps of one batch size, and of parts, in turns; then ours fed from photos."""
    limit_s, build_limit_s = LIMITS_S[device]
    ours = [name for name, spec in specs.items() if spec.network in NETWORKS]
    fed = [name for name in ours if photos and specs[name].subject in NETWORKS]  # those that a run trains
    cases = {**parts, **{name: (StepCase, device, spec, crop_px) for name, spec in specs.items()}}
    with ExitStack() as stack:
        bench.start(stack, cases, {name: build_limit_s if name in ours else limit_s for name in cases})
        for name in bench.cases.keys() & set(ours):
            bench.cases[name].limit(limit_s)
        bench.note("start", only=specs)
        bench.measure(num_rounds, "measure", *STEPS[device])
        if fed:
            bench.measure(num_rounds, "measure_fed", FED_STEPS[device], photos, only=fed, label="fed, ")
        bench.note("profile", only=specs)


def note_mfu(bench: Bench, specs: Sequence[StepSpec], crop_px: int) -> dict[str, float | None]:
    """Note MFU, the share that a best round has of the best matrix product of all; return the products."""
    peaks: dict[str, float | None] = {}
    for spec in specs:
        facts, rates = bench.facts[str(spec)], bench.rounds[str(spec)].get("images_per_s")
        gemms = [r for name, r in bench.rounds.items() if name.startswith(f"gemm {spec.precision} ")]
        best = (max(values) for rounds in gemms for values in rounds.values())
        peaks[str(spec.precision)] = peak = max(best, default=None)
        if rates:
            facts["gflop_per_image"] = gflop = gflop_of(spec.network, crop_px)
            facts["mfu"] = max(rates) * gflop / peak if peak else None
        facts["why"] = facts.pop("why", None)  # the longest text in the last column
    return peaks


def make_ratios(bench: Bench, specs: Sequence[StepSpec]) -> tuple[dict[str, float | None], list[str]]:
    """Return the promised ratios, and the notes on them.

    Those of the first batch have plain names; of another there are six, with its size at the end.
    """
    ratios: dict[str, float | None] = {}
    notes: list[str] = []
    for batch in dict.fromkeys(spec.batch for spec in specs):
        names = {spec.subject: str(spec) for spec in specs if spec.batch == batch}
        rates = {subject: bench.rounds[name].get("images_per_s") for subject, name in names.items()}
        facts, end = bench.facts.get(names.get("owt", ""), {}), f"_at_{batch}" if ratios else ""
        owt, paper, bn = (rates.get(name) for name in ("owt", "paper", "bn"))
        theirs = [name for name in names if name.startswith("torchvision")]
        ways = {name: ratio for name in theirs if (ratio := median_ratio(owt, rates[name]))}
        best = min(ways, key=ways.__getitem__, default="")
        ratios |= {
            f"owt_vs_best_torchvision{end}": ways.get(best),
            f"owt_mfu{end}": facts.get("mfu"),
            f"paper_vs_no_lrn{end}": median_ratio(paper, rates.get("paper_no_lrn")),
            f"bn_vs_no_norm{end}": median_ratio(bn, rates.get("bn_no_norm")),
            f"owt_fast_vs_plain{end}": median_ratio(owt, rates.get("owt_plain")),
            f"owt_deterministic_vs_owt{end}": median_ratio(rates.get("owt_deterministic"), owt),
        }
        if best:
            notes.append(f"owt_vs_best_torchvision{end}: {best} is the best of {', '.join(ways)}")
        if facts.get("step") == PLAIN:
            ratios[f"owt_fast_vs_plain{end}"] = None
            notes.append(f"owt_fast_vs_plain{end}: owt runs by the plain step itself")
        if not end:
            ratios["owt_vs_torchvision_reference"] = ways.get("torchvision_fp32")
            ratios["paper_vs_torch_lrn"] = ratio = median_ratio(paper, rates.get("paper_torch_lrn"))
            notes += ["paper_vs_torch_lrn: against the same net in float32"] * bool(ratio)
    lrn = [rounds for name, rounds in bench.rounds.items() if name.startswith("lrn ")]
    for form in ("eager", "fused"):
        found = [max(rounds[f"{form}_images_per_s"]) / max(rounds["torch_images_per_s"]) for rounds in lrn]
        ratios[f"lrn_{form}_vs_torch"] = min(found, default=None)
    fed = (bench.median(str(spec), "end_to_end_vs_slowest_part") for spec in specs)
    ratios["end_to_end_vs_slowest_part"] = worst = min(filter(None, fed), default=None)
    notes += ["lrn_*: the worse memory format"] * bool(lrn)
    notes += ["end_to_end_vs_slowest_part: the worst network; loader and steps share the cores"] * bool(worst)
    return ratios, notes
