"""The command `alexnet predict`. Imports its work inside its body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from data_pipeline.common.errors import EXIT_SOME_UNREADABLE

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.option("--model", type=PATH, help="An exported model. Default: the newest export under runs/.")
@click.option("--backend", type=click.Choice(["auto", "onnx", "trt"]), default="auto", show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--decoder", type=click.Choice(["auto", "dali", "pillow"]), default="auto", show_default=True,
    help="Who decodes: DALI where it is installed, on the GPU where the model runs there, else Pillow.",
)  # fmt: skip
@click.option("--top", type=int, help="Classes to report for each image. Default: 5, or all if fewer.")
@click.option(
    "--min-probability", type=click.FloatRange(0, 1), default=0.0, show_default=True,
    help="Leave out classes below.",
)  # fmt: skip
@click.option("--ten-crop", is_flag=True, help="Average the softmax of the paper's ten views of each image.")
@click.option(
    "--features", type=click.Choice(["fc7", "fc6", "pool5"]),
    help="Write what this layer computes to --output, FILE.parquet or FILE.npy, in place of classes. The "
    "model must be exported with --features.",
)  # fmt: skip
@click.option("--batch-size", type=int, default=32, show_default=True, help="Images a batch.")
@click.option(
    "--recursive/--no-recursive", default=True, show_default=True, help="Enter folders inside folders."
)
@click.option("--strict", is_flag=True, help="Stop with code 1 at the first input that cannot be read.")
@click.option(
    "--format", type=click.Choice(["table", "jsonl", "csv", "parquet"]),
    help="How rows are written. Default: as the name of --output ends, else table.",
)  # fmt: skip
@click.option("--output", type=PATH, help="Write the rows to this file instead of stdout.")
@click.option("--resume", is_flag=True, help="Go on after the rows that --output already has.")
@click.option("--overwrite", is_flag=True, help="Replace the rows or the gallery of an earlier run.")
@click.option("--html", type=PATH, help="Write a gallery besides, to sort and filter in a browser.")
@click.option(
    "--truth", metavar="folder|FILE",
    help="The true classes: names of the images' folders, or a CSV file of path,class. Adds the accuracy.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
    help="ray: workers of a Ray cluster write --output, a folder of Parquet or JSONL parts.",
)  # fmt: skip
@click.option("--address", help="The Ray cluster, as ray.init takes it. Default: one of its own, here.")
@click.option(
    "--workers", type=click.IntRange(1), help="Ray: workers. Default: one on each GPU, or as the CPUs allow."
)
@click.option("--part-rows", type=click.IntRange(1), help="Ray: inputs a part. Default: 256 to 4096.")
def predict(**options: Any) -> None:
    """Predict the classes of images.

    PATH is an image, a folder, a tar shard, a glob, @list.txt (a file of paths), or - (a list or an
    image on stdin). One row for each input, in order; what cannot be read is a row with the reason.

    \b
    alexnet predict images/
    alexnet predict images/ --output rows.jsonl --html gallery.html
    alexnet predict val/ --truth folder
    find /data -name '*.jpg' -print0 | alexnet predict - --output rows.parquet --resume
    alexnet predict images/ --features fc7 --output features.parquet
    alexnet predict shards/*.tar --engine ray --output rows/ --workers 8 --resume
    """
    from concurrent.futures import ThreadPoolExecutor

    from infer.bundle.load import open_bundle

    with ThreadPoolExecutor(1, thread_name_prefix="verify") as pool:
        # Hashing a model and importing what runs it take about as long, and the one needs no interpreter.
        verified = pool.submit(open_bundle, options["model"])
        from infer.commands.run_predict import run_predict
        from infer.predict.options import PredictOptions

        summary = run_predict(PredictOptions(**options), verified.result)
    if summary.errors + summary.kept_errors:
        raise click.exceptions.Exit(EXIT_SOME_UNREADABLE)
