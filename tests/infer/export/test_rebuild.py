"""An engine built again from a bundle's own ONNX file: judged, said to be unknown, or refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

import infer.export.rebuild
from alexnet import main
from data_pipeline.common.errors import UserError
from infer.bundle.load import Bundle, load_bundle
from infer.bundle.manifest import read_manifest
from infer.export.options import EngineOptions
from infer.export.to_tensorrt import _Build, build_engine
from infer.runtime.base import Outputs
from infer.runtime.choose import probe_machine, why_no_engine
from infer.runtime.cuda import scan_gpus
from infer.runtime.onnx import OnnxBackend
from tests.helpers.infer_samples import data_folder, edit_manifest, tiny_manifest

NO_GPU_HERE = pytest.mark.skipif(bool(scan_gpus().gpus), reason="this machine has a GPU")


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.folder, tmp_path / "copy"))


def export(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


@pytest.mark.slow
@NO_GPU_HERE
def test_rebuild_replaces_a_damaged_engine_and_keeps_the_onnx(copy: Path, bundle: Bundle) -> None:
    (copy / "model.engine").write_bytes(b"rust")
    done = export(copy, "--format", "trt", "--opt-batch", 2, "--max-batch", 4, "--builder-level", 1)
    assert done.exit_code == 0, done.stderr
    found = load_bundle(copy).manifest
    before = bundle.manifest
    assert found.files["model.onnx"] == before.files["model.onnx"]
    assert found.files["model.engine"] != before.files["model.engine"]
    assert found.engine is not None and found.max_batch == 4
    assert (found.engine.profile_batches, found.engine.builder_level) == ((1, 2, 4), 1)
    assert found.report is not None and before.report is not None
    assert found.report.onnx == before.report.onnx
    assert found.rebuild is not None
    assert (found.rebuild.replaces, found.rebuild.agreement) == (before.engine, None)
    assert found.rebuild.unknown == f"not run here: {scan_gpus().reason}"
    assert f"model.engine  unknown: not run here: {scan_gpus().reason}" in done.stdout
    assert "model.engine was built again on " in done.stdout
    doctor = CliRunner().invoke(main, ["doctor", str(copy)])
    assert doctor.exit_code == 0 and "was built again on " in doctor.stdout
    card = (copy / "README.md").read_text(encoding="utf-8")
    assert "batches of 1 to 4, tuned for 2, builder level 1" in card and "was built again on " in card
    weights = "model.safetensors"
    assert (copy / weights).read_bytes() == (bundle.folder / weights).read_bytes()
    assert sorted(p.name for p in copy.parent.iterdir()) == ["copy"]


def test_rebuild_refuses_a_damaged_onnx_file(copy: Path) -> None:
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"x")
    before = (copy / "model.engine").read_bytes()
    done = export(copy, "--format", "trt")
    assert done.exit_code == 1 and "model.onnx: not what was exported" in done.stderr
    assert (copy / "model.engine").read_bytes() == before


@pytest.mark.slow
@NO_GPU_HERE
def test_rebuild_of_an_onnx_bundle_writes_one_beside_it(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "export" / "onnx-fp32"
    folder.mkdir(parents=True)
    for path in (bundle.onnx_path, bundle.cpu_path):
        shutil.copy(path, folder)
    plain = msgspec.to_builtins(bundle.manifest)
    plain["files"].pop("model.engine")
    plain |= {"format": "onnx", "engine": None, "report": {**plain["report"], "engine_not_run": None}}
    (folder / "bundle.json").write_bytes(msgspec.json.encode({**plain, "manifest_sha256": "0" * 64}))
    edit_manifest(folder)
    before = (folder / "bundle.json").read_bytes()
    done = export(folder, "--format", "onnx,trt", "--gpu", "sm89", "--json")
    assert done.exit_code == 0, done.stderr
    made = load_bundle(folder.parent / "trt-fp32").manifest
    assert msgspec.json.decode(done.stdout)["engine"]["gpus"] == ["sm89"]
    assert made.engine is not None and made.engine.gpus == ("sm89",)
    assert made.rebuild is not None and made.rebuild.replaces is None
    assert (folder / "bundle.json").read_bytes() == before
    # The place is taken, by the export of another checkpoint: it is not written over.
    edit_manifest(
        folder.parent / "trt-fp32", checkpoint={**msgspec.to_builtins(made.checkpoint), "sha256": "2" * 64}
    )
    refused = export(folder, "--format", "trt")
    assert refused.exit_code == 2
    assert "trt-fp32 holds the export of another checkpoint: say where with --out" in refused.stderr


@pytest.mark.slow
def test_rebuild_runs_without_torch_and_train(copy: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'train', 'onnx'): sys.modules[name] = None\n"
        "from alexnet import main\n"
        "main(['export', sys.argv[1], '--format', 'trt', '--gpu', 'sm89'], standalone_mode=False)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(copy)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert load_bundle(copy).manifest.rebuild is not None


class Altered:
    """The ONNX file in place of an engine that this machine cannot run, with its probabilities changed."""

    def __init__(self, bundle: Bundle, by: float) -> None:
        self._onnx, self._by = OnnxBackend(bundle, "cpu"), by

    def run(self, images_NHWC: NDArray[np.uint8], *, features: bool = False) -> Outputs:
        probabilities_NC, _ = self._onnx.run(images_NHWC)
        return Outputs((1 - self._by) * probabilities_NC + self._by * probabilities_NC[:, ::-1])

    def close(self) -> None:
        self._onnx.close()


@pytest.fixture
def runs_here(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """An engine that runs here and differs by a share that the test sets."""
    by = [0.0]
    monkeypatch.setattr(infer.export.rebuild, "why_no_engine", lambda bundle, machine: None)
    monkeypatch.setattr(infer.export.rebuild, "load_for_gate", lambda bundle: Altered(bundle, by[0]))
    return by


@pytest.mark.slow
def test_rebuilt_engine_is_compared_with_the_onnx_file(
    base: Path, copy: Path, runs_here: list[float]
) -> None:
    runs_here[0] = 1e-6
    done = export(copy, "--format", "trt", "--gpu", "sm89", "--data", data_folder(base))
    assert done.exit_code == 0, done.stderr
    rebuild = read_manifest(copy).rebuild
    assert rebuild is not None and rebuild.agreement is not None
    assert (rebuild.data, rebuild.split, rebuild.num_images) == ("digits", "val", 50)
    assert 1e-8 < rebuild.agreement.max_probability_difference <= 1.2e-6
    assert "against model.onnx on 50 images of digits/val:" in done.stdout
    # Without its data it is said to be unknown, and not passed over in silence.
    done = export(copy, "--format", "trt", "--gpu", "sm89")
    assert done.exit_code == 0, done.stderr
    assert "unknown: it loads and runs here, and was compared on no images: " in done.stdout


@pytest.mark.slow
def test_rebuilt_engine_that_differs_is_code_4_and_not_kept(
    base: Path, copy: Path, runs_here: list[float]
) -> None:
    runs_here[0] = 0.01
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    done = export(copy, "--format", "trt", "--gpu", "sm89", "--data", data_folder(base))
    assert done.exit_code == 4
    assert "gate: model.engine does not agree with model.onnx (" in done.stderr
    assert "a probability differs by " in done.stderr
    assert "nothing was replaced" in done.stderr.splitlines()[-1]
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_rebuild_report_beyond_its_limits_is_refused(base: Path, copy: Path) -> None:
    manifest = msgspec.to_builtins(read_manifest(copy))
    agreement = {**manifest["report"]["onnx"], "max_probability_difference": 0.5}
    rebuild = {
        "created": "2026-01-02T03:04:05+00:00", "replaces": None, "data": "digits", "split": "val",
        "num_images": 50, "num_failed": 0, "onnx_accuracy": agreement["accuracy"], "agreement": agreement,
    }  # fmt: skip
    edit_manifest(copy, rebuild=rebuild)
    assert "beyond its own limits" in CliRunner().invoke(main, ["doctor", str(copy)]).stderr
    edit_manifest(copy, rebuild={**rebuild, "agreement": None})
    assert "was either compared or it was not" in CliRunner().invoke(main, ["doctor", str(copy)]).stderr


@pytest.mark.slow
def test_rebuild_refuses_wrong_options_with_code_2(bundle: Bundle, tmp_path: Path) -> None:
    for arguments, words in (
        ((), "is exported already: --format trt builds its engine for this machine, --triton DIR writes"),
        (("--format", "onnx"), "is exported already"),
        (("--precision", "fp16"), "is in fp32: export a checkpoint in fp16"),
        (("--calibrate", tmp_path), "--calibrate is for a checkpoint; a bundle has its ranges already"),
        (("--opset", 17), "--opset is for a checkpoint; a bundle's ONNX files stay as they are"),
        (("--one-file",), "--one-file is for a checkpoint"),
        (("--max-batch", 4), "--max-batch is for a checkpoint, or for --format trt, which builds an engine"),
        (("--gpu", "sm89"), "--gpu is for a checkpoint, or for --format trt"),
        (("--format", "trt", "--opt-batch", 9), "--opt-batch 9: a number from 1 to 8, the largest batch"),
        (("--format", "trt", "--builder-level", 6), "--builder-level 6: a number from 0 to 5"),
        (("--format", "trt", "--max-batch", 0), "--max-batch 0: a number from 1 to 4096"),
        (("--format", "xml"), "--format xml: onnx, trt, or onnx,trt"),
    ):
        done = export(bundle.folder, *arguments)
        assert done.exit_code == 2, (arguments, done.output)
        (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
        assert words in line, line


@NO_GPU_HERE
def test_timing_cache_is_refused_for_tensorrt_rtx(bundle: Bundle, tmp_path: Path) -> None:
    done = export(bundle.folder, "--format", "trt", "--timing-cache", tmp_path / "cache")
    assert done.exit_code == 2 and "--timing-cache is for tensorrt, and the engine" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_timing_cache_that_is_none_is_refused(tmp_path: Path) -> None:
    """TensorRT-RTX has the calls, and does nothing with what they make; TensorRT has the same ones."""
    trt = pytest.importorskip("tensorrt_rtx")
    build = _Build(trt, "fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert build.attach_timing_cache(tmp_path / "not-there") is not None
        (tmp_path / "cache").write_bytes(b"no timing cache at all")
        with pytest.raises(
            UserError, match=r"--timing-cache .*cache: not one of tensorrt_rtx .* for this GPU"
        ):
            build.attach_timing_cache(tmp_path / "cache")


def test_precision_check_records_opset_and_ir_version(bundle: Bundle) -> None:
    model = onnx.load(bundle.onnx_path)
    check = bundle.manifest.precision_check
    assert (check.opset, check.ir_version) == (model.opset_import[0].version, model.ir_version)


@pytest.mark.gpu
def test_rebuilt_engine_runs_here_and_agrees(base: Path, copy: Path) -> None:
    done = export(copy, "--format", "trt", "--data", data_folder(base), "--builder-level", 1)
    assert done.exit_code == 0, done.stderr
    bundle = load_bundle(copy)
    if reason := why_no_engine(bundle, probe_machine()):
        pytest.skip(reason)
    rebuild = bundle.manifest.rebuild
    assert rebuild is not None and rebuild.agreement is not None
    assert rebuild.agreement.max_probability_difference <= 1e-4


@pytest.mark.gpu
def test_timing_cache_is_written_and_read(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    cache = tmp_path / "timings"
    for _ in range(2):
        options = EngineOptions(timing_cache=cache)
        build_engine(bundle.onnx_path, tmp_path / "e", tiny_manifest(), 4, options)
        assert cache.stat().st_size > 100
