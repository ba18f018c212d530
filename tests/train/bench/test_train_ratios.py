"""The ratios of `alexnet bench train` are those of the cases that their names say."""

from __future__ import annotations

import pytest

from train.bench.harness import Bench
from train.bench.subjects import SUBJECTS, StepSpec, make_specs
from train.bench.train import make_ratios, note_mfu

IMAGES_PER_S = {
    "torchvision_fp32": 100.0, "torchvision_bf16": 200.0, "torchvision_graphs": 300.0, "owt": 800.0,
    "paper": 300.0, "paper_no_lrn": 400.0, "paper_torch_lrn": 100.0, "bn": 160.0, "bn_no_norm": 200.0,
    "owt_plain": 320.0, "owt_deterministic": 640.0,
}  # fmt: skip


def measured_at(batches: list[int]) -> tuple[Bench, list[StepSpec]]:
    """Two rounds of all subjects, at other batches than the first twice as fast; the loader, LRN alone."""
    bench, specs = Bench(), make_specs([spec.subject for spec in SUBJECTS], batches, "bf16", "cuda")
    for spec in specs:
        factor = 1 if spec.batch == batches[0] else 2
        bench.rounds[str(spec)] = {"images_per_s": [factor * IMAGES_PER_S.get(spec.subject, 10.0)] * 2}
        for precision, gflops in (("bf16", 10e3), ("fp16", 8e3), ("fp32", 5e3)):
            rounds = {"gflops_4096": [1.0, gflops / factor], "gflops_8192": [2.0, 3.0]}
            bench.rounds[f"gemm {precision} batch {spec.batch}"] = rounds
    for name, values in (("owt", [0.5, 0.75]), ("paper", [0.875, 0.875])):
        bench.rounds[f"{name} bf16 batch {batches[0]}"]["end_to_end_vs_slowest_part"] = values
    for layout, torchs in (("contiguous", [1.0, 2.0]), ("channels_last", [3.0, 2.0])):
        bench.rounds[f"lrn {layout}"] = {
            "torch_images_per_s": torchs, "eager_images_per_s": [7.5, 1.0], "fused_images_per_s": [1.0, 15.0],
        }  # fmt: skip
    return bench, specs


def test_ratios_are_of_the_cases_they_name() -> None:
    bench, specs = measured_at([8, 64])
    assert note_mfu(bench, specs, 224) == {"bf16": 10e3, "fp16": 8e3, "fp32": 5e3}
    ratios, notes = make_ratios(bench, specs)
    mfu = ratios.pop("owt_mfu")
    assert mfu == pytest.approx(800 * 4.1446 / 10e3, rel=0.001)
    assert mfu and ratios.pop("owt_mfu_at_64") == pytest.approx(2 * mfu, rel=0.001)
    assert ratios == {
        "owt_vs_best_torchvision": pytest.approx(8 / 3),
        "owt_vs_best_torchvision_at_64": pytest.approx(8 / 3),
        "owt_vs_torchvision_reference": 8.0,
        "paper_vs_no_lrn": 0.75,
        "paper_vs_no_lrn_at_64": 0.75,
        "bn_vs_no_norm": 0.8,
        "bn_vs_no_norm_at_64": 0.8,
        "owt_fast_vs_plain": 2.5,
        "owt_fast_vs_plain_at_64": 2.5,
        "owt_deterministic_vs_owt": 0.8,
        "owt_deterministic_vs_owt_at_64": 0.8,
        "paper_vs_torch_lrn": 3.0,
        "lrn_eager_vs_torch": 2.5,
        "lrn_fused_vs_torch": 5.0,
        "end_to_end_vs_slowest_part": 0.625,
    }
    assert notes[0] == (
        "owt_vs_best_torchvision: torchvision_graphs is the best of torchvision_fp32, torchvision_amp, "
        "torchvision_bf16, torchvision_compiled, torchvision_graphs"
    )


def test_best_way_of_torchvision_is_of_those_measured() -> None:
    bench, specs = measured_at([8])
    for name in ("torchvision_graphs", "bn"):
        bench.rounds[f"{name} bf16 batch 8"].clear()
    ratios, notes = make_ratios(bench, specs)
    assert ratios["owt_vs_best_torchvision"] == 4.0 and ratios["bn_vs_no_norm"] is None
    assert notes[0].startswith("owt_vs_best_torchvision: torchvision_bf16 is the best of torchvision_fp32, ")
    assert "torchvision_graphs" not in notes[0]


def test_ratios_of_nothing_are_none_and_have_no_notes() -> None:
    ratios, notes = make_ratios(Bench(), make_specs(["paper"], [8], "bf16", "cuda"))
    assert set(ratios.values()) == {None} and len(ratios) == 11 and notes == []


def test_gain_of_the_fast_step_is_none_where_the_plain_one_runs() -> None:
    bench, specs = measured_at([8, 64])
    bench.facts["owt bf16 batch 8"] = {"step": "plain", "why": "the fast one needs a GPU", "kernels": 9.0}
    bench.facts["owt bf16 batch 64"] = {"step": "graph", "why": "it is the fastest"}
    ratios, notes = make_ratios(bench, specs)
    assert ratios["owt_fast_vs_plain"] is None and ratios["owt_fast_vs_plain_at_64"] == 2.5
    assert "owt_fast_vs_plain: owt runs by the plain step itself" in notes
    note_mfu(bench, specs, 64)
    facts = bench.facts["owt bf16 batch 8"]
    assert facts["why"] == "the fast one needs a GPU" and list(facts)[-1] == "why", "the last column"
