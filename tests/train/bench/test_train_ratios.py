"""The ratios of `alexnet bench train` are those of the cases that their names say."""

from __future__ import annotations

import pytest

from train.bench.subjects import SUBJECTS, make_specs
from train.bench.train import Measured, make_ratios, make_row

STEP_S = {
    "torchvision_fp32": 8.0, "torchvision_bf16": 4.0, "torchvision_graphs": 3.0, "owt": 1.0, "paper": 2.0,
    "paper_no_lrn": 1.5, "paper_torch_lrn": 7.0, "bn": 5.0, "bn_no_norm": 4.0, "owt_plain": 2.5,
    "owt_deterministic": 1.25,
}  # fmt: skip


def measured_at(batches: list[int]) -> Measured:
    measured = Measured(crop_px=224, gemm_gflops={"bf16": 100.0, "fp16": 80.0, "fp32": 50.0})
    for spec in make_specs([spec.subject for spec in SUBJECTS], batches, "bf16", "cuda"):
        seconds = STEP_S.get(spec.subject, 100.0) * (1 if spec.batch == batches[0] else 4)
        measured.seconds[spec, "step"] = [seconds] * 2
        if spec.subject == "owt" and spec.batch == batches[0]:
            measured.seconds[spec, "fed_step"] = [1.0, 1.0]
            measured.seconds[spec, "loader"] = [0.1, 1.5]
            measured.seconds[spec, "end_to_end"] = [2.0, 2.0]
    measured.lrn_s["a"] = {"torch": 6.0, "eager": 2.0, "fused": 1.0}
    measured.lrn_s["b"] = {"torch": 5.0, "eager": 2.0, "fused": 1.0}
    return measured


def test_ratios_are_of_the_cases_they_name() -> None:
    measured = measured_at([8, 64])
    specs = list(dict.fromkeys(spec for spec, _ in measured.seconds))
    ratios, notes = make_ratios(specs, measured)
    mfu = ratios.pop("owt_mfu")
    assert mfu == pytest.approx(8 * 0.7e9 * 2 * 3 / 100e9, rel=0.05)
    assert mfu and ratios.pop("owt_mfu_at_64") == pytest.approx(2 * mfu, rel=0.001)
    assert ratios == {
        "owt_vs_best_torchvision": 3.0,
        "owt_vs_best_torchvision_at_64": 3.0,
        "owt_vs_torchvision_reference": 8.0,
        "paper_vs_no_lrn": 0.75,
        "paper_vs_no_lrn_at_64": 0.75,
        "bn_vs_no_norm": 0.8,
        "bn_vs_no_norm_at_64": 0.8,
        "owt_fast_vs_plain": 2.5,
        "owt_fast_vs_plain_at_64": 2.5,
        "owt_deterministic_vs_owt": 0.8,
        "owt_deterministic_vs_owt_at_64": 0.8,
        "paper_vs_torch_lrn": 3.5,
        "lrn_eager_vs_torch": 2.5,
        "lrn_fused_vs_torch": 5.0,
        "end_to_end_vs_slowest_part": 0.625,
    }
    assert not [note for note in notes if "not measured" in note]
    assert notes[0] == (
        "owt_vs_best_torchvision: torchvision_graphs is the best of torchvision_fp32, torchvision_amp, "
        "torchvision_bf16, torchvision_compiled, torchvision_graphs"
    )


def test_best_way_of_torchvision_is_of_those_measured() -> None:
    measured = measured_at([8])
    specs = list(dict.fromkeys(spec for spec, _ in measured.seconds))
    for spec in specs:
        if spec.subject in ("torchvision_graphs", "bn"):
            del measured.seconds[spec, "step"]
    ratios, notes = make_ratios(specs, measured)
    assert ratios["owt_vs_best_torchvision"] == 4.0 and ratios["bn_vs_no_norm"] is None
    assert notes[0] == "bn_vs_no_norm: not measured"
    assert notes[1].startswith("owt_vs_best_torchvision: torchvision_bf16 is the best of torchvision_fp32, ")
    assert "torchvision_graphs" not in notes[1]


def test_gain_of_the_fast_step_is_none_where_the_plain_one_runs() -> None:
    measured = measured_at([8, 64])
    specs = list(dict.fromkeys(spec for spec, _ in measured.seconds))
    for spec in specs:
        if spec.subject == "owt":
            step = "plain" if spec.batch == 8 else "graph"
            measured.figures[spec] = {"step": step, "why": "the fast one needs a GPU"}
    ratios, notes = make_ratios(specs, measured)
    assert ratios["owt_fast_vs_plain"] is None and ratios["owt_fast_vs_plain_at_64"] == 2.5
    assert notes[0] == "owt_fast_vs_plain: owt runs by the plain step itself"
    rows = [make_row(spec, measured) for spec in specs if spec.subject in ("owt", "torchvision_bf16")]
    assert [row["step"] for row in rows] == [None, "plain", None, "graph"]
    assert [row["why"] for row in rows[:2]] == [None, "the fast one needs a GPU"]
