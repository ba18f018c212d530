"""`alexnet bench …`: what is fast here, measured. Every command imports its work inside its body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

RECIPE = [
    click.option("--recipe", default="demo", show_default=True, help="Name of a recipe, or its file."),
    click.option("--data", "root", type=click.Path(path_type=Path), help="Folder with train/ and val/."),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set a key, as in training. Repeatable.",
    ),
]


def recipe_options(command: Any) -> Any:
    """Options that name what to train, for commands that train a recipe's own steps."""
    for option in reversed(RECIPE):
        command = option(command)
    return command


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

    from train.bench.data import bench_data, describe

    report = bench_data(
        folder,
        num_images=images,
        rounds=rounds,
        batches_per_round=batches,
        tell=lambda line: click.echo(line, err=True),
    )
    click.echo(msgspec.json.encode(report) if as_json else describe(report))


@bench.command()
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where the files are kept. Default: a temporary folder."
)
@click.option(
    "--files", type=click.IntRange(256), default=1_281_167, show_default=True,
    help="How many to make: hard links, which need no room.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def startup(folder: Path | None, files: int, as_json: bool) -> None:
    """Seconds to the first batch, and memory, on as many files as ImageNet has: first, again, and changed.

    \b
    alexnet bench startup
    alexnet bench startup --files 20000 --json
    """
    import msgspec

    from train.bench.startup import bench_startup, describe

    report = bench_startup(folder, num_files=files, tell=lambda line: click.echo(line, err=True))
    click.echo(msgspec.json.encode(report) if as_json else describe(report))


@bench.command()
@click.option(
    "--variant", "variants", multiple=True, type=click.Choice(["owt", "paper", "caffe", "bn"]),
    default=("owt", "paper"), show_default=True, help="A network to measure. Repeatable.",
)  # fmt: skip
@click.option(
    "--batch", "batches", multiple=True, type=click.IntRange(2), default=(128,), show_default=True,
    help="Images of a step. Repeatable; the ratios are of the first.",
)  # fmt: skip
@click.option(
    "--precision", "precisions", multiple=True, type=click.Choice(["bf16", "fp16", "fp32"]),
    help="Repeatable; the ratios are of the first. Default: what training chooses here, and fp32.",
)  # fmt: skip
@click.option(
    "--rounds", type=click.IntRange(1), default=5, show_default=True, help="Turns that every subject takes."
)
@click.option(
    "--crop", "crop_px", type=click.IntRange(63), default=224, show_default=True, help="Side of the images."
)
@click.option("--compile", "compiled", is_flag=True, help="Measure each network compiled as a whole, too.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Where the JPEGs are kept. Default: a temporary folder.",
)
@click.option(
    "--images", type=click.IntRange(2), default=2000, show_default=True, help="How many JPEGs to write."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def train(as_json: bool, images: int, **options: Any) -> None:
    """Images/s of training and its fraction of the arithmetic peak; torchvision's AlexNet beside it.

    Forward, backward, step, and end to end with the loader; subjects take turns. Ten minutes on two cores.

    \b
    alexnet bench train
    alexnet bench train --json --variant owt --rounds 3
    """
    import msgspec

    from train.bench.train import bench_train, describe

    report = bench_train(num_images=images, tell=lambda line: click.echo(line, err=True), **options)
    click.echo(msgspec.json.encode(report) if as_json else describe(report))


@bench.command()
@recipe_options
@click.option("--from", "low", type=click.FloatRange(0, min_open=True), help="First rate. [1e-4; lars: 0.01]")
@click.option("--to", "high", type=click.FloatRange(0, min_open=True), help="Last rate. [1; lars: 100]")
@click.option(
    "--steps", "num_steps", type=click.IntRange(10), default=100, show_default=True, help="Of each sweep."
)
@click.option(
    "--sweeps", "num_sweeps", type=click.IntRange(1), default=3, show_default=True,
    help="How often, from other seeds.",
)  # fmt: skip
@click.option(
    "--plot", type=click.Path(path_type=Path), default=Path("bench-lr.png"), show_default=True,
    help="The picture: .png, .svg or .pdf.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def lr(
    recipe: str, root: Path | None, overrides: tuple[str, ...], plot: Path, as_json: bool, **options: Any
) -> None:
    """Learning-rate range test: the loss as the rate grows, its plot, and a recommended rate.

    Trains a recipe's network on its data, on one device: a batch means the same on any number of ranks.

    \b
    alexnet bench lr
    alexnet bench lr --recipe tiny-imagenet --data tiny-imagenet-200 --steps 300
    """
    import msgspec

    from train.config.load import make_config
    from train.tune.lr_range import bench_rates, describe, draw
    from train.tune.plots import check_picture

    check_picture(plot)
    report = bench_rates(make_config(recipe, overrides, root), **options)
    draw(report, plot)
    click.echo(f"picture: {plot}", err=True)
    click.echo(msgspec.json.encode(report) if as_json else describe(report))


@bench.command()
@recipe_options
@click.option("--from", "smallest", type=click.IntRange(2), default=8, show_default=True, help="First size.")
@click.option("--to", "largest", type=click.IntRange(2), default=512, show_default=True, help="Last size.")
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="Timed at each size.")
@click.option(
    "--noise-steps", type=click.IntRange(6), default=60, show_default=True,
    help="Of training, for the noise scale.",
)  # fmt: skip
@click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="To recommend for.")
@click.option("--limit-mb", type=click.FloatRange(1), help="Memory of a step. [90% of what is there]")
@click.option(
    "--plot", type=click.Path(path_type=Path), default=Path("bench-batch.png"), show_default=True,
    help="The picture: .png, .svg or .pdf.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def batch(
    recipe: str, root: Path | None, overrides: tuple[str, ...], plot: Path, as_json: bool, **options: Any
) -> None:
    """Throughput and memory by batch size, the gradient noise scale, and the global_batch that follows.

    The network, data and rate are a recipe's; sizes double until one does not fit.

    \b
    alexnet bench batch
    alexnet bench batch --recipe imagenet-owt --data DIR --to 2048 --ranks 8
    """
    import msgspec

    from train.config.load import make_config
    from train.tune.batch_size import bench_batches, describe, draw
    from train.tune.plots import check_picture

    check_picture(plot)
    report = bench_batches(make_config(recipe, overrides, root), **options)
    draw(report, plot)
    click.echo(f"picture: {plot}", err=True)
    click.echo(msgspec.json.encode(report) if as_json else describe(report))


@bench.command()
@click.option(
    "--variant", type=click.Choice(["owt", "paper", "caffe", "bn"]), default="owt", show_default=True,
    help="The network.",
)  # fmt: skip
@click.option(
    "--mode", "modes", multiple=True, type=click.Choice(["ddp", "ddp+bf16", "hybrid"]),
    default=("ddp", "ddp+bf16", "hybrid"), show_default=True, help="A way to train. Repeatable.",
)  # fmt: skip
@click.option(
    "--ranks", multiple=True, type=click.IntRange(1, 64), default=(1, 2, 4), show_default=True,
    help="How many. Repeatable.",
)  # fmt: skip
@click.option(
    "--link", "links", multiple=True, metavar="RATE",
    help="Measure on two hosts, too, joined by a wire of this rate, such as 1gbit: network namespaces on "
    "this machine, which take root on Linux. Repeatable.",
)  # fmt: skip
@click.option(
    "--batch", "rank_batch", type=click.IntRange(2), default=64, show_default=True, help="Of a rank."
)
@click.option("--crop", "crop_px", type=click.IntRange(22), default=224, show_default=True)
@click.option("--classes", "num_classes", type=click.IntRange(2), default=1000, show_default=True)
@click.option(
    "--precision", type=click.Choice(["auto", "bf16", "fp16", "fp32"]), default="auto", show_default=True
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Turns of every mode.")
@click.option("--steps", type=click.IntRange(1), default=3, show_default=True, help="Timed in each turn.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="As in training. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def scaling(as_json: bool, **options: Any) -> None:
    """Step time, efficiency and bytes sent of several ranks: plain, compressed and hybrid.

    Over loopback, and with --link over a wire of some rate. Ten minutes on two cores.

    \b
    alexnet bench scaling
    sudo alexnet bench scaling --ranks 2 --link 500mbit --json
    """
    import msgspec

    from train.bench.scaling import bench_scaling, describe

    report = bench_scaling(tell=lambda line: click.echo(line, err=True), **options)
    click.echo(msgspec.json.encode(report) if as_json else describe(report))
