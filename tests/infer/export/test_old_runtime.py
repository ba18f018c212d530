"""A lower opset for an older ONNX Runtime, which is installed into an environment of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infer.bundle.load import Bundle
from infer.export.gate import torch_runner
from infer.export.onnx_options import OnnxOptions
from tests.helpers.environments import clean_environ, make_environment
from tests.helpers.infer_samples import checkpoint_folder, export_model
from train.checkpoints.load import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.network]

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


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="ONNX Runtime 1.16 has no wheels for Python 3.12")
def test_opset_17_runs_where_opset_20_is_refused(bundle: Bundle, base: Path, tmp_path: Path) -> None:
    python = make_environment(tmp_path / "old", "onnxruntime==1.16.3", "numpy<2")
    folder, images = checkpoint_folder(base), tmp_path / "images.npy"
    low = export_model(
        folder, "onnx", out=tmp_path / "low", onnx_options=OnnxOptions(opset=17, one_file=True)
    )
    images_NHWC = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    np.save(images, images_NHWC)
    paths = [str(path) for path in (low.onnx_path, low.cpu_path, bundle.onnx_path)]
    command = [str(python), "-c", RUN, str(images), *paths]
    done = subprocess.run(command, env=clean_environ(), capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["version"] == "1.16.3"
    expected = torch_runner(load_checkpoint(folder))(images_NHWC)
    for path in paths[:2]:
        for rows in found[path]:  # from the file, and from its bytes
            np.testing.assert_allclose(rows, expected, atol=3e-5, err_msg=path)
    assert all("is till opset 19" in said for said in found[paths[2]])
