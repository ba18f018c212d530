"""Triton model repositories: compared with Triton's own protobuf schema, and complete or absent."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner, Result
from google.protobuf import text_format

from alexnet import main
from data_pipeline.common.errors import CorruptFileError, UserError
from infer.bundle.load import Bundle, load_bundle
from infer.export.triton import config_text, write_repository
from tests.helpers.infer_samples import (
    checkpoint_folder,
    data_folder,
    tiny_manifest,
    with_engine,
    write_tiny,
)

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture(scope="session")
def schema() -> ModuleType:
    """`model_config.proto` as tritonclient ships it; the package would want grpc."""
    package = importlib.util.find_spec("tritonclient")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0], "grpc", "model_config_pb2.py")
    spec = importlib.util.spec_from_file_location("triton_model_config", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse(text: str, schema: ModuleType) -> Any:
    """As Triton reads `config.pbtxt`: an unknown field or a wrong type is an error."""
    return text_format.Parse(text, schema.ModelConfig())


def export(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_triton_schema_refuses_unknown_keys_and_types(schema: ModuleType) -> None:
    for text in ("max_batch: 3", 'max_batch_size: "3"', "input [ { data_type: TYPE_UINT9 } ]"):
        with pytest.raises(text_format.ParseError):
            parse(text, schema)


def test_triton_repository_of_an_onnx_model(bundle: Bundle, tmp_path: Path, schema: ModuleType) -> None:
    root = tmp_path / "models"
    done = export(bundle.folder, "--format", "onnx", "--triton", root)
    assert done.exit_code == 0, done.stderr
    model = root / "alexnet_fp32_onnx"
    assert done.stdout == f"triton model: {model}\n"
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) == [
        "alexnet_fp32_onnx/1/model.onnx",
        "alexnet_fp32_onnx/config.pbtxt",
        "alexnet_fp32_onnx/labels.txt",
    ]
    config = parse((model / "config.pbtxt").read_text(), schema)
    assert (config.name, config.max_batch_size) == (model.name, bundle.manifest.max_batch)
    assert (config.backend, config.platform) == ("onnxruntime", "onnxruntime_onnx")
    assert config.default_model_filename == "model.onnx"
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert list(config.dynamic_batching.preferred_batch_size) == []
    (images,), (probabilities,) = config.input, config.output
    # What the file itself says, behind the batch that Triton adds in front of `dims`.
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    (told,), (tells,) = session.get_inputs(), session.get_outputs()
    assert (images.name, list(images.dims)) == (told.name, told.shape[1:]) == ("images", [56, 56, 3])
    assert (probabilities.name, list(probabilities.dims)) == (tells.name, tells.shape[1:])
    assert (told.type, tells.type) == ("tensor(uint8)", "tensor(float)")
    assert (images.data_type, images.format) == (schema.TYPE_UINT8, schema.ModelInput.FORMAT_NHWC)
    assert probabilities.data_type == schema.TYPE_FP32
    assert probabilities.label_filename == "labels.txt"
    assert (model / "labels.txt").read_text().splitlines() == list(bundle.manifest.classes)
    assert config.parameters["checkpoint_sha256"].string_value == bundle.manifest.checkpoint.sha256
    (found,) = session.run(None, {"images": np.zeros((3, 56, 56, 3), np.uint8)})
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)


def test_triton_config_of_an_engine_has_its_profile(tmp_path: Path, schema: ModuleType) -> None:
    manifest = with_engine("tensorrt", "11.0", ("sm89",))
    assert manifest.engine is not None and manifest.engine.profile_batches == (1, 8, 8)
    folder = write_tiny(tmp_path / "b", manifest)
    found = write_repository(tmp_path / "models", {"trt": load_bundle(folder)})
    assert found == [tmp_path / "models" / "alexnet_fp32_trt"]
    assert (found[0] / "1" / "model.plan").read_bytes() == (folder / "model.engine").read_bytes()
    config = parse((found[0] / "config.pbtxt").read_text(), schema)
    assert (config.backend, config.platform) == ("tensorrt", "tensorrt_plan")
    assert (config.max_batch_size, list(config.dynamic_batching.preferred_batch_size)) == (8, [8])
    (group,) = config.instance_group
    assert (group.kind, group.count) == (schema.ModelInstanceGroup.KIND_GPU, 1)
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    assert (parameters["tensorrt"], parameters["gpus"]) == ("11.0", "sm89")


def test_triton_labels_have_one_line_each(tmp_path: Path, schema: ModuleType) -> None:
    manifest = tiny_manifest(classes=("cat\nand\x1b[31m", 'do"g \\ ñ'))
    write_repository(tmp_path / "m", {"onnx": load_bundle(write_tiny(tmp_path / "b", manifest))})
    labels = (tmp_path / "m" / "alexnet_fp32_onnx" / "labels.txt").read_text().splitlines()
    assert len(labels) == 2 and "\x1b" not in "".join(labels) and labels[1] == 'do"g \\ ñ'
    parse(config_text(manifest, "onnx"), schema)


def test_triton_repository_keeps_models_and_never_overwrites(bundle: Bundle, tmp_path: Path) -> None:
    root = tmp_path / "models"
    (root / "resnet" / "1").mkdir(parents=True)
    assert export(bundle.folder, "--format", "onnx", "--triton", root).exit_code == 0
    assert sorted(p.name for p in root.iterdir()) == ["alexnet_fp32_onnx", "resnet"]
    again = export(bundle.folder, "--format", "onnx", "--triton", root)
    assert again.exit_code == 2
    assert "alexnet_fp32_onnx is there already; remove it, or name another folder" in again.stderr
    (tmp_path / "file").touch()
    assert (
        "is not a folder" in export(bundle.folder, "--format", "onnx", "--triton", tmp_path / "file").stderr
    )


def test_triton_refuses_an_rtx_engine_before_building(base: Path, bundle: Bundle, tmp_path: Path) -> None:
    assert bundle.manifest.engine is not None
    if bundle.manifest.engine.library != "tensorrt_rtx":
        pytest.skip("this machine builds engines that Triton loads")
    for arguments in ((bundle.folder,), (checkpoint_folder(base), "--format", "onnx,trt")):
        result = export(*arguments, "--triton", tmp_path / "models")
        assert result.exit_code == 2
        assert "Triton's TensorRT backend loads engines of tensorrt, not of tensorrt_rtx" in result.stderr
        assert not (tmp_path / "models").exists()


def test_triton_copy_of_a_changed_file_leaves_nothing(tmp_path: Path) -> None:
    bundle = load_bundle(write_tiny(tmp_path / "b"))
    bundle.onnx_path.write_bytes(b"something else!!!!")
    with pytest.raises(CorruptFileError, match="changed while it was copied"):
        write_repository(tmp_path / "m", {"onnx": bundle})
    assert list((tmp_path / "m").iterdir()) == []


@pytest.mark.slow
def test_export_with_triton_writes_both(base: Path, tmp_path: Path, schema: ModuleType) -> None:
    done = export(
        *(checkpoint_folder(base), "--precision", "fp16", "--max-batch", 4, "--data", data_folder(base)),
        *("--out", tmp_path / "b", "--triton", tmp_path / "m"),
    )
    assert done.exit_code == 0, done.stderr
    model = tmp_path / "m" / "alexnet_fp16_onnx"
    assert f"triton model: {model}" in done.stdout.splitlines()
    config = parse((model / "config.pbtxt").read_text(), schema)
    assert (config.max_batch_size, config.parameters["precision"].string_value) == (4, "fp16")
    assert (model / "1" / "model.onnx").read_bytes() == (tmp_path / "b" / "model.onnx").read_bytes()


def test_triton_refuses_a_damaged_bundle(bundle: Bundle, tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "b")
    (folder / "model.onnx").write_bytes(b"x")
    result = export(folder, "--triton", tmp_path / "m")
    assert result.exit_code == 1 and "not what was exported" in result.stderr
    with pytest.raises(UserError, match="not of tensorrt_rtx"):
        write_repository(tmp_path / "m", {"trt": load_bundle(write_tiny(tmp_path / "c", with_engine()))})
    assert not (tmp_path / "m").exists()
