"""A lower opset, and files that need no other; with an older ONNX Runtime in an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from alexnet import main
from infer.bundle.describe import describe_export
from infer.bundle.load import Bundle
from infer.export.gate import torch_runner
from infer.export.options import OnnxOptions
from tests.helpers.environments import clean_environ, make_environment
from tests.helpers.infer_samples import checkpoint_folder, export_model
from train.checkpoints.load import load_checkpoint

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture(scope="module")
def low(thin: None, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A gated export with the lowest opset, each file whole."""
    options, out = OnnxOptions(opset=17, one_file=True), tmp_path_factory.mktemp("low") / "onnx-fp32"
    return export_model(checkpoint_folder(base), "onnx", out=out, onnx_options=options)


@pytest.mark.slow
def test_opset_and_one_file_reach_every_file_of_the_bundle(low: Bundle) -> None:
    manifest = low.manifest
    assert manifest.cpu is not None and manifest.cpu.reads == ""
    for check in (manifest.precision_check, manifest.cpu.precision_check):
        assert (check.opset, check.ir_version) == (17, 8)
    assert manifest.report is not None and manifest.report.onnx.top1_agreement == 1
    assert "  needs ONNX Runtime 1.12 or later (opset 17, IR 8)" in describe_export(low)
    for path in (low.onnx_path, low.cpu_path):
        onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("opset", [16, 21])
def test_opset_has_bounds(base: Path, opset: int) -> None:
    done = CliRunner().invoke(main, ["export", str(checkpoint_folder(base)), f"--opset={opset}"])
    assert done.exit_code == 2
    assert done.stderr == f"error: --opset {opset}: a number from 17 to 20\n"


RUN = """
import json, sys
import numpy as np, onnxruntime
images = np.load(sys.argv[1])
found = {"version": onnxruntime.__version__}
for path in sys.argv[2:]:
    for model in (path, open(path, "rb").read()):
        try:
            session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
            rows = session.run(None, {"images": images})[0].tolist()
        except Exception as error:
            rows = str(error)
        found.setdefault(path, []).append(rows)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.skipif(sys.version_info >= (3, 12), reason="ONNX Runtime 1.16 has no wheels for Python 3.12")
def test_opset_17_runs_where_opset_20_is_refused(
    low: Bundle, bundle: Bundle, base: Path, tmp_path: Path
) -> None:
    python = make_environment(tmp_path / "old", "onnxruntime==1.16.3", "numpy<2")
    images = tmp_path / "images.npy"
    images_NHWC = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    np.save(images, images_NHWC)
    paths = [str(path) for path in (low.onnx_path, low.cpu_path, bundle.onnx_path)]
    command = [str(python), "-c", RUN, str(images), *paths]
    done = subprocess.run(command, env=clean_environ(), capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["version"] == "1.16.3"
    expected = torch_runner(load_checkpoint(checkpoint_folder(base)))(images_NHWC).probabilities
    for path in paths[:2]:
        for rows in found[path]:  # from the file, and from its bytes
            np.testing.assert_allclose(rows, expected, atol=3e-5, err_msg=path)
    assert all("is till opset 19" in said for said in found[paths[2]])
