"""`alexnet doctor` on machines that are not this one."""

from __future__ import annotations

import pytest

import infer.doctor.machine
from infer.doctor.machine import examine
from infer.runtime.choose import Machine
from infer.runtime.cuda import Gpu, GpuScan


@pytest.mark.parametrize(
    ("gpu", "installed", "words"),
    [
        (
            Gpu("NVIDIA H200", "sm90"),
            {"tensorrt_rtx": "1.7"},
            "cannot run here: NVIDIA H200 is sm90, which needs tensorrt, though tensorrt_rtx is installed: "
            "pip install 'alexnet[trt]'",
        ),
        (Gpu("NVIDIA H200", "sm90"), {"tensorrt": "11.0", "tensorrt_rtx": "1.7"}, "run with tensorrt 11.0"),
        (Gpu("NVIDIA L4", "sm89"), {"tensorrt_rtx": "1.7"}, "run with tensorrt_rtx 1.7"),
        (
            Gpu("NVIDIA L4", "sm89"),
            {},
            "cannot run here: neither TensorRT is installed: pip install 'alexnet[trt]' or 'alexnet[rtx]'",
        ),
        (None, {}, "cannot run here"),
    ],
)
def test_doctor_says_whose_engines_run_on_a_gpu(
    gpu: Gpu | None, installed: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = GpuScan((gpu,), None) if gpu else GpuScan((), "no NVIDIA driver")
    machine = Machine(scan, installed, cuda_provider=True)
    monkeypatch.setattr(infer.doctor.machine, "probe_machine", lambda: machine)
    assert examine()["prediction"]["engines"] == words
