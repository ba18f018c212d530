"""`alexnet bench`: the group of all benchmarks, and `infer`, which imports its work inside its body."""

from __future__ import annotations

from typing import Any

import click

from train.bench import cli
from train.bench.cli import INT, option, repeatable
from train.tune.cli import batch, lr

MODELS = click.Choice(["owt", "paper"])
PRECISIONS = click.Choice(["fp32", "fp16", "int8"])


@click.command()
@repeatable(
    "--model", "models", type=MODELS, default=("owt", "paper"), help="A network to measure. Repeatable."
)
@repeatable("--precision", "precisions", type=PRECISIONS, default=("fp32", "int8"), help="Repeatable.")
@repeatable(
    "--batch", "batches", type=INT(1, 256), default=(1, 8, 32, 128, 256),
    help="Images of a batch. Repeatable; the ratios are for 32.",
)  # fmt: skip
@cli.folder_option("photographs")
@cli.images_option("num_images", at_least=10, default=1000)
@cli.rounds_option(5, "Turns at a batch of 32.")
@option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@cli.json_option
def infer(as_json: bool, **options: Any) -> None:
    """Images/s of prediction, phase by phase and end to end, against a plain loop; the first row's time.

    Models with random weights go through export and gate first. Ten minutes on two cores.

    \b
    alexnet bench infer
    alexnet bench infer --json --model owt --batch 32 --rounds 3
    """
    from infer.bench.predict import bench_infer

    cli.echo_report(bench_infer(**options), as_json)


bench = click.Group(
    "bench",
    commands=[batch, cli.data, infer, lr, cli.scaling, cli.startup, cli.train],
    help="Measure this machine: each command compares in one run and reports ratios.",
)
