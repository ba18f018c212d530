"""The command `alexnet export`. Imports its work inside its body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("source", metavar="[CHECKPOINT|BUNDLE|torchvision]", type=PATH, required=False)
@click.option(
    "--format", "formats", metavar="onnx|trt|onnx,trt",
    help="ONNX (the default), or a TensorRT engine with the ONNX file beside it, or a bundle of each. "
    "Of a BUNDLE, trt builds the engine again from its ONNX file.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "int8"]),
    help="Of weights and arithmetic; LRN and softmax stay in float32. Default: fp32.",
)  # fmt: skip
@click.option(
    "--calibrate", type=PATH,
    help="Folder with train/ for int8's ranges. Default: what it was trained on.",
)  # fmt: skip
@click.option(
    "--opset", type=int, metavar="17…20",
    help="Version of ONNX's operators; older runtimes need a lower one. Default: 20, for ONNX Runtime 1.17.",
)  # fmt: skip
@click.option(
    "--one-file", is_flag=True,
    help="Write each ONNX file with all its weights. Else model.cpu.onnx reads them from model.onnx.",
)  # fmt: skip
@click.option(
    "--features", type=click.Choice(["fc7", "fc6", "pool5"]),
    help="Give what this layer computes as a second output, for predict --features and search.",
)  # fmt: skip
@click.option("--max-batch", type=int, help="Largest batch the model takes. Default: 64, or the bundle's.")
@click.option("--opt-batch", type=int, help="Batch that the engine is tuned for. Default: 32 or the largest.")
@click.option("--builder-level", type=int, help="0 builds soonest, 5 searches longest. Default: 3.")
@click.option(
    "--timing-cache",
    type=PATH,
    help="TensorRT's kernel timings, read and written: the next build is shorter.",
)
@click.option("--gpu", default="", metavar="sm89,…", help="Build the engine for these GPUs only.")
@click.option(
    "--out", type=PATH,
    help="Folder to write; with two formats, the folder of both. Default: export/<format>-<precision>, or "
    "the bundle's own.",
)  # fmt: skip
@click.option("--data", type=PATH, help="Folder with val/ for the gate. Default: what it was trained on.")
@click.option("--mirror", metavar="URL", help="Fetch torchvision's file from a folder of another server.")
@click.option("--triton", type=PATH, metavar="DIR", help="Write models for Triton Inference Server as well.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the bundle's manifest as JSON; of two formats, both by name.",
)
def export(as_json: bool, **options: Any) -> None:
    """Export a checkpoint to ONNX or TensorRT, if it agrees with the checkpoint on validation images.

    Default: the best checkpoint of the newest run. Of a BUNDLE, --format trt builds the engine for
    this machine from the ONNX file in it, and --triton writes a model repository. The word torchvision
    stands for torchvision's pretrained alexnet: its weights are fetched, and a run is made of them in runs/.

    \b
    alexnet export torchvision
    alexnet export --format onnx
    alexnet export --format onnx,trt --precision int8 --max-batch 128
    alexnet export --format trt --precision fp16 --gpu sm89,sm120 --builder-level 5
    alexnet export runs/demo-20260101T000000Z/export/trt-fp32 --format trt
    """
    import msgspec

    from infer.bundle.describe import describe_export
    from infer.commands.run_export import ExportOptions, run_export

    made = run_export(ExportOptions(**options))
    for model in made.triton:
        click.echo(f"triton model: {model}", err=as_json)
    if as_json:
        manifests = {format: bundle.manifest for format, bundle in made.bundles.items()}
        one = next(iter(manifests.values())) if len(manifests) == 1 else manifests
        click.echo(msgspec.json.format(msgspec.json.encode(one)))
        return
    for bundle in made.bundles.values():
        for line in describe_export(bundle):
            click.echo(line)
