"""`alexnet doctor BUNDLE`: what is whole is said to be, and no change to any file of a bundle goes unseen."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx
import pytest
from click.testing import CliRunner, Result

from alexnet import main
from data_pipeline.common.errors import CorruptFileError, UserError
from infer.bundle.load import Bundle, load_bundle
from infer.bundle.manifest import SCHEMA_VERSION, read_manifest
from infer.bundle.write import measure_files
from infer.doctor.bundle import examine_bundle
from infer.runtime.choose import probe_machine, why_no_engine
from infer.runtime.cuda import scan_gpus
from infer.runtime.onnx import OnnxBackend
from tests.helpers.infer_samples import (
    data_folder,
    edit_manifest,
    tiny_manifest,
    write_tiny,
)


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.folder, tmp_path / "copy"))


def doctor(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def remeasure(folder: Path) -> None:
    """Make the manifest fit the files again, as somebody would who knows how."""
    files = measure_files(folder, read_manifest(folder).files)
    edit_manifest(folder, files=msgspec.to_builtins(files))


def test_doctor_reports_origin_gate_and_gpus_of_a_bundle(bundle: Bundle) -> None:
    result = doctor(bundle.folder, "--json")
    assert result.exit_code == 0, result.stderr
    found = msgspec.json.decode(result.stdout)
    manifest = bundle.manifest
    assert found["healthy"] is True and found["unlisted"] == []
    assert found["beside"] == ["README.md", "model.safetensors"]
    assert [(f["name"], f["sha256"], f["problem"]) for f in found["files"]] == [
        (name, entry.sha256, None) for name, entry in manifest.files.items()
    ]
    assert found["checkpoint"]["sha256"] == manifest.checkpoint.sha256
    assert found["gate"]["onnx"]["top1_agreement"] == 1 and found["gate_limits_are_todays"] is True
    assert len(found["manifest_sha256"]) == 64
    loads_on = "ONNX Runtime 1.17 or later (opset 20, IR 9), on CPU and GPUs; exported with ONNX Runtime "
    assert found["loads_on"]["model.onnx"].startswith(loads_on)
    for_cpu = "for ONNX Runtime on a CPU, reads its weights from model.onnx beside it; Conv float"
    assert found["loads_on"]["model.cpu.onnx"].startswith(for_cpu)
    assert manifest.engine is not None
    assert f"loads on GPUs of {', '.join(manifest.engine.gpus)}" in found["loads_on"]["model.engine"]
    assert found["here"]["model.cpu.onnx on the CPU"].startswith("ok: ran on cpu with ONNX Runtime")

    lines = doctor(bundle.folder).stdout.splitlines()
    for entry in manifest.files.values():
        assert any(line.endswith(f"MB, SHA-256 {entry.sha256}") and ": ok, " in line for line in lines)
    assert f"  checkpoint: SHA-256 {manifest.checkpoint.sha256}" in lines
    assert "  paper, recipe demo, step 7, epoch 1; top1 0.5, loss 1.5" in lines
    assert any(line.startswith("gate: 50 of 50 images of digits/val") for line in lines)
    for name in ("model.onnx", "model.cpu.onnx"):
        assert any(re.match(rf"    {name} +100\.00% +100\.00%", line) for line in lines), lines


@pytest.mark.skipif(bool(scan_gpus().gpus), reason="this machine has a GPU")
def test_doctor_without_a_gpu_names_what_runs_instead(bundle: Bundle) -> None:
    found = examine_bundle(bundle.folder)
    assert found.here["model.engine"] == f"no: {scan_gpus().reason}"
    assert found.here["model.onnx on the GPU"] == f"no: {scan_gpus().reason}"
    assert found.predict_would_use is not None
    assert found.predict_would_use.startswith(
        "model.cpu.onnx on the CPU (not its engine, since no NVIDIA driver"
    )
    assert found.advice is None  # nothing can be built for a GPU that is not there


@pytest.mark.parametrize("name", ["model.onnx", "model.cpu.onnx", "model.engine"])
@pytest.mark.parametrize("how", ["bit", "cut", "longer", "gone", "link"])
def test_doctor_exits_1_on_a_changed_file_and_runs_nothing(
    base: Path, copy: Path, name: str, how: str
) -> None:
    path = copy / name
    if how == "bit":
        flip_bit(path, path.stat().st_size // 2)
    elif how == "cut":
        os.truncate(path, path.stat().st_size - 1)
    elif how == "longer":
        with path.open("ab") as file:
            file.write(b"\0")
    elif how == "gone":
        path.unlink()
    else:  # the same bytes, somewhere else
        path.rename(copy.parent / name)
        path.symlink_to(copy.parent / name)
    result = doctor(copy, "--json")
    assert result.exit_code == 1
    assert result.stderr == "error: the bundle is damaged: export the checkpoint again\n"
    found = msgspec.json.decode(result.stdout)
    words = "missing, or not a plain file" if how in ("gone", "link") else "not what was exported (another"
    problems = {f["name"]: f["problem"] for f in found["files"]}
    assert problems.pop(name).startswith(words) and set(problems.values()) == {None}
    # The form for the CPU reads its weights from the other file.
    assert found["here"][name if name == "model.engine" else "model.cpu.onnx on the CPU"] == "damaged"
    assert found["predict_would_use"] is None
    assert f"{name}: {words}" in doctor(copy).stdout
    with pytest.raises(CorruptFileError, match=name):
        load_bundle(copy)
    image = next(data_folder(base).glob("val/*/*.jpg"))
    refused = CliRunner().invoke(main, ["predict", str(image), "--model", str(copy)])
    assert refused.exit_code == 1 and f"{name}: {words}" in refused.stderr


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b'"digits"', b'"dogits"'),  # where the gate's images came from
        lambda text: text.replace(b'"accuracy": 0', b'"accuracy": 1', 1),
        lambda text: text.replace(b'"precision": "fp32"', b'"precision": "fp16"'),
        lambda text: text.replace(b'"mean": [', b'"mean": [ 1, ', 1),
        lambda text: text[:-20],
        lambda text: text.replace(b"manifest_sha256", b"manifest_sha255"),
    ],
)  # fmt: skip
def test_manifest_with_a_changed_word_is_refused(copy: Path, change: Callable[[bytes], bytes]) -> None:
    path = copy / "bundle.json"
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    result = doctor(copy)
    assert result.exit_code == 1 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {path}: ") and line.endswith("export the checkpoint again")


def test_manifest_digest_ignores_spaces_and_key_order(copy: Path) -> None:
    path = copy / "bundle.json"
    plain = msgspec.json.decode(path.read_bytes())
    path.write_bytes(msgspec.json.encode(dict(reversed(plain.items()))))
    assert examine_bundle(copy).healthy


def test_gate_report_beyond_its_limits_is_refused(copy: Path) -> None:
    report = msgspec.to_builtins(read_manifest(copy).report)
    report["onnx"]["max_probability_difference"] = 0.5
    edit_manifest(copy, report=report)
    result = doctor(copy)
    assert result.exit_code == 1 and "beyond its own limits: a probability differs by 0.5" in result.stderr


def test_doctor_finds_a_model_of_another_checkpoint(copy: Path, bundle: Bundle) -> None:
    model = onnx.load(copy / "model.cpu.onnx", load_external_data=False)
    (entry,) = (p for p in model.metadata_props if p.key == "checkpoint_sha256")
    entry.value = "2" * 64
    onnx.save(model, copy / "model.cpu.onnx")
    remeasure(copy)
    result = doctor(copy, "--json")
    assert result.exit_code == 1
    found = msgspec.json.decode(result.stdout)
    assert found["here"]["model.cpu.onnx on the CPU"].startswith("damaged:")
    assert "another checkpoint than its bundle.json says" in found["here"]["model.cpu.onnx on the CPU"]
    with pytest.raises(CorruptFileError, match="another checkpoint"):
        OnnxBackend(load_bundle(copy), "cpu")


def test_doctor_finds_an_engine_of_another_checkpoint(copy: Path, bundle: Bundle) -> None:
    plan = (copy / "model.engine").read_bytes()
    ours = bundle.manifest.checkpoint.sha256.encode()
    assert plan.count(ours) >= 1
    (copy / "model.engine").write_bytes(plan.replace(ours, b"2" * 64))
    remeasure(copy)
    found = examine_bundle(copy)
    assert not found.healthy
    problems = {f.name: f.problem for f in found.files}
    assert problems["model.engine"] == "does not name the checkpoint that it should be built from"
    assert found.here["model.engine"] == "damaged"


def test_doctor_names_unlisted_files_which_are_not_used(copy: Path) -> None:
    (copy / "model.plan").write_bytes(b"something else")
    result = doctor(copy)
    assert result.exit_code == 0, result.stderr
    assert "  model.plan: not listed in bundle.json; nothing uses it" in result.stdout


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1])
def test_another_schema_is_one_line_of_code_2(copy: Path, version: int) -> None:
    edit_manifest(copy, schema_version=version, gate={})
    words = f"has schema {version}, and this program reads {SCHEMA_VERSION}: export the checkpoint again"
    for command in (["doctor"], ["predict", str(copy / "bundle.json"), "--model"], ["evaluate"]):
        result = CliRunner().invoke(main, [*command, str(copy)])
        assert result.exit_code == 2
        assert result.stderr.splitlines()[-1] == f"error: {copy / 'bundle.json'} {words}"


def test_manifest_without_its_digest_is_refused(copy: Path) -> None:
    plain = msgspec.json.decode((copy / "bundle.json").read_bytes(), type=dict[str, object])
    del plain["manifest_sha256"]
    (copy / "bundle.json").write_bytes(msgspec.json.encode(plain))
    assert "does not match its manifest_sha256" in doctor(copy).stderr


def test_doctor_exits_2_on_wrong_paths(tmp_path: Path) -> None:
    assert doctor(tmp_path).exit_code == 2
    assert "holds no bundle.json" in doctor(tmp_path).stderr
    assert "does not exist" in doctor(tmp_path / "nowhere").stderr
    with pytest.raises(UserError, match=r"holds no bundle\.json"):
        examine_bundle(tmp_path)
    write_tiny(tmp_path / "draft", tiny_manifest(report=None))
    assert "has no gate report" in doctor(tmp_path / "draft").stderr


def test_doctor_reports_bytes_that_are_no_model(tmp_path: Path) -> None:
    """Right hash, no model: the runtime's refusal is an answer, not a crash."""
    found = examine_bundle(write_tiny(tmp_path / "tiny"))
    assert found.here["model.onnx on the CPU"].startswith("no: ONNX Runtime cannot load the model: ")
    assert found.healthy and found.predict_would_use is None


@pytest.mark.gpu
def test_doctor_loads_and_runs_the_engine(bundle: Bundle) -> None:
    if reason := why_no_engine(bundle, probe_machine()):
        pytest.skip(reason)
    found = examine_bundle(bundle.folder)
    assert found.healthy
    assert found.here["model.engine"].startswith("ok: ran on NVIDIA")
    assert found.here["model.onnx on the GPU"].startswith("ok: ran on NVIDIA")
    assert found.predict_would_use is not None and found.predict_would_use.startswith("its engine on the GPU")
