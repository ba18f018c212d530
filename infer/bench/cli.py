"""`alexnet bench infer`, beside the trainer's benchmarks. Imports its work inside its body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from train.bench.cli import bench as bench


@bench.command()
@click.option(
    "--model", "models", multiple=True, type=click.Choice(["owt", "paper"]), default=("owt", "paper"),
    show_default=True, help="A network to measure. Repeatable.",
)  # fmt: skip
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice(["fp32", "fp16", "int8"]),
    default=("fp32", "int8"), show_default=True, help="Repeatable.",
)  # fmt: skip
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(1, 256), default=(1, 8, 32, 128, 256),
    show_default=True, help="Images of a batch. Repeatable; the ratios are for 32.",
)  # fmt: skip
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where the photographs are kept. Default: a temporary folder.",
)
@click.option(
    "--images", "num_images", type=click.IntRange(10), default=1000, show_default=True,
    help="How many JPEGs to write.",
)  # fmt: skip
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns at a batch of 32."
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def infer(as_json: bool, **options: Any) -> None:
    """Images/s of prediction, phase by phase and end to end, against a plain loop; the first row's time.

    Models with random weights go through export and gate first. Ten minutes on two cores.

    \b
    alexnet bench infer
    alexnet bench infer --json --model owt --batch 32 --rounds 3
    """
    import msgspec

    from infer.bench.predict import bench_infer, describe

    report = bench_infer(tell=lambda line: click.echo(line, err=True), **options)
    click.echo(msgspec.json.encode(report) if as_json else describe(report))
