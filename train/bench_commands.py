"""`alexnet bench …`: what is fast here, measured. Every command imports its work inside its body."""

from __future__ import annotations

from pathlib import Path

import click


@click.group()
def bench() -> None:
    """Measure this machine: each command compares in one run and reports ratios."""


@bench.command()
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where the images are kept. Default: a temporary folder.",
)
@click.option(
    "--images", type=click.IntRange(128), default=2000, show_default=True, help="How many JPEGs to write."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns that every loader takes."
)
@click.option(
    "--batches", type=click.IntRange(1), default=15, show_default=True, help="Batches of 64 in each turn."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def data(folder: Path | None, images: int, rounds: int, batches: int, as_json: bool) -> None:
    """Images/s of our loader against torchvision's and DALI's own, on training crops of 224.

    On the CPU, each loader pinned to the same cores. The loaders take turns; the figures are medians.

    \b
    alexnet bench data
    alexnet bench data --json --images 512 --rounds 3
    """
    import msgspec

    from train.bench_data import bench_data, describe

    report = bench_data(
        folder,
        num_images=images,
        rounds=rounds,
        batches_per_round=batches,
        tell=lambda line: click.echo(line, err=True),
    )
    click.echo(msgspec.json.encode(report) if as_json else describe(report))
