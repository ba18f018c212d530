"""The subjects of `alexnet bench train`: their names, and how each is measured on a CPU and on a GPU."""

from __future__ import annotations

import pytest

from train.bench import cli
from train.bench.subjects import DEFAULT, OTHERS, SUBJECTS, make_specs


def test_subjects_are_those_that_the_command_takes() -> None:
    names = [*(spec.subject for spec in SUBJECTS), *OTHERS]
    assert sorted(names) == sorted(cli.SUBJECTS) and len(set(names)) == len(names) == 20
    assert {*DEFAULT["cpu"]} < {*DEFAULT["cuda"]} < {*names}
    assert [n for n in cli.SUBJECTS if n not in DEFAULT["cuda"]] == [
        "caffe", "owt_compiled", "paper_compiled", "bn_compiled", "caffe_compiled",
    ]  # fmt: skip


def test_subjects_on_a_gpu_are_torchvisions_five_ways_and_ours() -> None:
    specs = make_specs(DEFAULT["cuda"], [128, 1024], "bf16", "cuda")
    assert [f"{spec.subject} {spec.precision}" for spec in specs if spec.batch == 128] == [
        "torchvision_fp32 fp32", "torchvision_amp fp16", "torchvision_bf16 bf16", "torchvision_compiled bf16",
        "torchvision_graphs bf16", "owt bf16", "paper bf16", "bn bf16", "paper_no_lrn bf16",
        "paper_torch_lrn fp32", "bn_no_norm bf16", "owt_plain bf16", "owt_deterministic bf16",
    ]  # fmt: skip
    at_1024 = [spec.subject for spec in specs if spec.batch == 1024]
    assert at_1024 == [s.subject for s in specs if s.batch == 128 and s.subject != "paper_torch_lrn"]
    assert [(spec.tuned, spec.compiled) for spec in specs[:5]] == [
        (False, ""), (False, ""), (True, ""), (True, "default"), (True, "reduce-overhead"),
    ]  # fmt: skip


def test_subjects_on_a_cpu_have_no_float16_and_no_graphs(caplog: pytest.LogCaptureFixture) -> None:
    specs = make_specs(["torchvision_amp", "torchvision_graphs", "bn"], [4, 4], "fp32", "cpu")
    assert [str(spec) for spec in specs] == ["torchvision_amp bf16 batch 4", "bn fp32 batch 4"]
    assert caplog.messages == ["torchvision_graphs is left out: it needs a GPU"]


def test_plain_and_deterministic_steps_are_of_one_subject_each() -> None:
    """All others are trained as a run is by itself."""
    keys = {spec.subject: spec.keys for spec in SUBJECTS if spec.keys}
    assert keys == {"owt_plain": ("fused=off",), "owt_deterministic": ("deterministic=true",)}
