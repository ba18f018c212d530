"""`alexnet evaluate`, `predict` and `export` on checkpoints and exports: results, rows, exit codes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import msgspec
import pytest

from infer.bundle.gate_report import LIMITS
from infer.bundle.load import Bundle
from tests.helpers.checkpoint_samples import save_small_network
from tests.helpers.command_line import assert_one_line, invoke
from tests.helpers.infer_samples import take_onnx_files
from tests.helpers.ranks import run_command

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture(scope="module")
def run(bundle: Bundle) -> Path:
    return bundle.folder.parent.parent


def test_evaluate_of_an_export_equals_the_checkpoints(run: Path, bundle: Bundle) -> None:
    checkpoint = run / "checkpoints" / "step-00000007"
    root = run.parent / "digits"
    assert_one_line(invoke("evaluate", bundle.folder), 2, "use --data DIR")
    (run / "config.json").write_bytes(msgspec.json.encode({"data": {"root": str(root)}}))
    results = [invoke("evaluate", path, "--json", "--device", "cpu") for path in (checkpoint, bundle.folder)]
    (run / "config.json").unlink()
    assert [r.exit_code for r in results] == [0, 0], results
    ours, theirs = (msgspec.json.decode(r.stdout) for r in results)
    assert ours["num_samples"] == theirs["num_samples"] == 50
    assert ours["num_failed"] == theirs["num_failed"] == 0
    assert (ours["top1"], ours["top5"]) == (theirs["top1"], theirs["top5"])
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert 0 < ours["top1"] < 1, "all right or all wrong would compare nothing"


def test_predict_writes_all_rows_and_exits_3_on_a_broken_file(
    bundle: Bundle, demo_data: Path, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number, image in enumerate(sorted(demo_data.glob("val/3/*.jpg"))[:3]):
        shutil.copy(image, images / f"{number}.jpg")
    (images / "1b.jpg").write_bytes((images / "1.jpg").read_bytes()[:200])
    arguments = ("predict", images, "--model", bundle.folder, "--format", "jsonl", "--device", "cpu")
    result = invoke(*arguments)
    assert result.exit_code == 3, result.stderr
    rows = [msgspec.json.decode(line) for line in result.stdout.splitlines()]
    assert [(Path(r["path"]).name, r["status"]) for r in rows] == [
        ("0.jpg", "ok"), ("1.jpg", "ok"), ("1b.jpg", "error"), ("2.jpg", "ok"),
    ]  # fmt: skip
    assert [len(r["predictions"]) for r in rows if r["status"] == "ok"] == [5, 5, 5]
    assert rows[2]["error"]
    assert "4 images, 1 of them could not be read" in result.stderr
    assert "CPUExecutionProvider" in result.stderr

    (images / "1b.jpg").unlink()
    output = tmp_path / "rows.jsonl"
    result = invoke(*arguments, "--output", output, "--top", "2")
    assert (result.exit_code, result.stdout) == (0, "")
    rows = [msgspec.json.decode(line) for line in output.read_bytes().splitlines()]
    assert [len(r["predictions"]) for r in rows] == [2, 2, 2]

    table = invoke("predict", images, "--model", bundle.folder)
    assert table.exit_code == 0
    assert "0.jpg" in table.stdout and "%" in table.stdout


def test_predict_names_the_newest_export_and_its_backend(
    bundle: Bundle, demo_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run-paper").symlink_to(bundle.folder.parent.parent)  # others may be newer
    (tmp_path / "images").symlink_to(demo_data / "val" / "0")
    done = run_command(["alexnet", "predict", "images/", "--format=jsonl", "--device=cpu"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "model: runs/run-paper/export/trt-fp32" in done.stderr
    assert "runs on: ONNX Runtime" in done.stderr


def test_wrong_models_and_inputs_are_one_error_line(run: Path, bundle: Bundle, tmp_path: Path) -> None:
    image = next((run.parent / "digits").glob("val/*/*.jpg"))
    assert_one_line(invoke("predict", tmp_path / "nothing", "--model", bundle.folder), 2, "no such file")
    assert_one_line(invoke("predict", tmp_path, "--model", bundle.folder), 2, "no images in")
    assert_one_line(invoke("predict", image, "--model", tmp_path), 2, "holds no bundle.json")
    assert_one_line(invoke("predict", image, "--model", bundle.folder, "--top", "11"), 2, "--top 11")
    assert_one_line(invoke("predict", image, "--format", "xml"), 2, "'xml' is not one of")
    assert_one_line(invoke("evaluate", tmp_path / "nothing"), 2, "does not exist")
    assert_one_line(invoke("export", tmp_path), 2, "neither a checkpoint nor a run")
    assert_one_line(invoke("evaluate", bundle.folder, "--data", tmp_path), 2, "no folder 'val'")


def test_models_whose_data_is_gone_say_that_data_helps(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint and an export were moved away from what they were trained on."""
    monkeypatch.chdir(tmp_path)
    folder, _ = save_small_network(tmp_path / "run" / "checkpoints")
    words = "no data folder data/demo-digits: "
    advice = "if the data is elsewhere now, name it with {} DIR"
    for command in ("export", "evaluate"):
        said = assert_one_line(invoke(command, folder), 2, words)
        assert said.endswith(advice.format("--data"))
    data = bundle.folder.parents[2] / "digits"  # val alone
    said = assert_one_line(invoke("export", folder, "--precision=int8", "--data", data), 2, words)
    assert said.endswith(advice.format("--calibrate"))
    (tmp_path / "run" / "export").mkdir(exist_ok=True)
    (tmp_path / "run" / "export" / "onnx-fp32").symlink_to(bundle.folder)
    (tmp_path / "run" / "config.json").write_text('{"data": {"root": "data/demo-digits"}}')
    said = assert_one_line(invoke("evaluate", "run/export/onnx-fp32"), 2, words)
    assert said.endswith(advice.format("--data"))


def test_damaged_files_exit_with_1(run: Path, bundle: Bundle, tmp_path: Path) -> None:
    step = tmp_path / "run" / "checkpoints" / "step-00000007"
    shutil.copytree(run / "checkpoints" / "step-00000007", step)
    with (step / "state.pt").open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    assert_one_line(invoke("evaluate", step), 1, "state.pt is damaged")
    assert_one_line(invoke("export", step), 1, "state.pt is damaged")
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.folder, copy)
    with (copy / "model.onnx").open("ab") as file:
        file.write(b"x")
    image = next((run.parent / "digits").glob("val/*/*.jpg"))
    assert_one_line(invoke("predict", image, "--model", copy), 1, "model.onnx")


@pytest.mark.slow
def test_export_beyond_the_gates_limits_exits_4_unshipped(
    run: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_onnx_files(bundle, monkeypatch)
    monkeypatch.setitem(
        LIMITS, "fp32", msgspec.structs.replace(LIMITS["fp32"], max_probability_difference=0.0)
    )
    out = tmp_path / "shipped"
    result = invoke("export", run / "checkpoints" / "step-00000007", "--out", out)
    assert_one_line(result, 4, "probability")
    assert not out.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_export_prints_limits_and_agreement(
    run: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_onnx_files(bundle, monkeypatch)
    result = invoke("export", run / "checkpoints" / "step-00000007", "--out", tmp_path / "b")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^ +top-1 +top-5 +ties +largest +mean +accuracy$", result.stdout, re.MULTILINE)
    row = re.search(r"^ +model\.onnx +100\.00% +100\.00% +0 +(\S+) +(\S+) ", result.stdout, re.MULTILINE)
    assert row is not None and 0 < float(row[2]) < float(row[1]) < 1e-4
    assert "  limits: top-1 agreement of at least 1, top-5 of at least 1, probabilities within 1e-04" in (
        result.stdout
    )
    result = invoke(
        "export", run / "checkpoints" / "step-00000007", "--out", tmp_path / "b", "--json", "--max-batch", "4"
    )
    manifest = msgspec.json.decode(result.stdout)
    assert manifest["max_batch"] == 4
    assert manifest["report"]["num_images"] == 50
