"""Train on the demo digits, export to ONNX, predict: the whole way from Python.

    python docs/examples/train_export_predict.py
    python docs/examples/train_export_predict.py epochs=1 model.hidden_units=256   # any key of a recipe

One process, on the GPU if there is one. More processes need torchrun or `alexnet train --nproc N`, because
each of them runs the whole program.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from alexnet import Predictor
from data_pipeline.common.console import set_up_logging
from infer.export.pipeline import export_models
from train.checkpoints.load import find_checkpoint
from train.config.load import make_config
from train.main import train


def main(overrides: list[str]) -> None:
    """Train with the recipe `demo`, in runs/; single keys of the recipe can be overridden."""
    set_up_logging()  # the trainer's log lines, on stderr

    # The same checks as on the command line: an unknown key is an error that names the nearest one.
    config = make_config("demo", overrides)
    result = train(config, Path("runs"), resume="none")
    assert result is not None  # None only on ranks other than the first
    run = Path(json.loads(result)["run"])

    # The run's best checkpoint, not its last. `export_models` compares the ONNX file with it on the
    # validation images and raises GateError if they disagree, so every bundle has been checked.
    bundle = export_models(find_checkpoint(run), ("onnx",))["onnx"]

    # The bundle knows how images are resized, cropped and normalised: nothing is passed by hand.
    images = sorted(Path(config.data.root or "").glob("val/*/*.jpg"))[::30]
    with Predictor(bundle, top=3) as predictor:
        print(predictor.runs_on)
        for row in predictor(images):
            # One row for each input, in order. A file that cannot be read is an error row, no exception.
            if row.status == "ok":
                print(row.path, " ".join(f"{p.label} {p.probability:.1%}" for p in row.predictions))
            else:
                print(row.path, row.error)


if __name__ == "__main__":
    main(sys.argv[1:])
