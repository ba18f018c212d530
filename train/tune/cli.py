"""`alexnet bench lr|batch`. Every command imports its work inside its body."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from train.bench.cli import INT, PATH, echo_report, json_option, option, overrides_option


def recipe_options(command: Any) -> Any:
    """Add the options that name what to train."""
    for add in (
        overrides_option(help="Set a key, as in training. Repeatable."),
        click.option("--data", "root", type=PATH, help="Folder with train/ and val/."),
        option("--recipe", default="demo", help="Name of a recipe, or its file."),
    ):
        command = add(command)
    return command


def plot_option(default: str) -> Callable[..., Any]:
    """Return `--plot`, where the picture is written."""
    return option("--plot", type=PATH, default=Path(default), help="The picture: .png, .svg or .pdf.")


def run_recipe(
    bench: Callable[..., dict[str, Any]], describe: Callable[..., list[str]], draw: Callable[..., None], *,
    recipe: str, root: Path | None, overrides: tuple[str, ...], plot: Path, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Measure a recipe, draw the picture, and print the report."""
    from train.config.load import make_config
    from train.tune.plots import check_picture

    check_picture(plot)
    report = bench(make_config(recipe, overrides, root), **options)
    draw(report, plot)
    click.echo(f"picture: {plot}", err=True)
    echo_report(report, as_json, describe)


@click.command()
@recipe_options
@click.option("--from", "low", type=click.FloatRange(0, min_open=True), help="First rate. [1e-4; lars: 0.01]")
@click.option("--to", "high", type=click.FloatRange(0, min_open=True), help="Last rate. [1; lars: 100]")
@option("--steps", "num_steps", type=INT(10), default=100, help="Of each sweep.")
@option("--sweeps", "num_sweeps", type=INT(1), default=3, help="How often, from other seeds.")
@plot_option("bench-lr.png")
@json_option
def lr(**options: Any) -> None:
    """Learning-rate range test: the loss as the rate grows, its plot, and a recommended rate.

    Trains a recipe's network on its data, on one device: a batch means the same on any number of ranks.

    \b
    alexnet bench lr
    alexnet bench lr --recipe tiny-imagenet --data tiny-imagenet-200 --steps 300
    """
    from train.tune.lr_range import bench_rates, describe
    from train.tune.plots import draw_rates

    run_recipe(bench_rates, describe, draw_rates, **options)


@click.command()
@recipe_options
@option("--from", "smallest", type=INT(2), default=8, help="First size.")
@option("--to", "largest", type=INT(2), default=512, help="Last size.")
@option("--steps", type=INT(1), default=5, help="Timed at each size.")
@option("--noise-steps", type=INT(6), default=60, help="Of training, for the noise scale.")
@option("--ranks", type=INT(1), default=1, help="To recommend for.")
@click.option("--limit-mb", type=click.FloatRange(1), help="Memory of a step. [90% of what is there]")
@plot_option("bench-batch.png")
@json_option
def batch(**options: Any) -> None:
    """Throughput and memory by batch size, the gradient noise scale, and the global_batch that follows.

    The network, data and rate are a recipe's; sizes double until one does not fit.

    \b
    alexnet bench batch
    alexnet bench batch --recipe imagenet-owt --data DIR --to 2048 --ranks 8
    """
    from train.tune.batch_size import bench_batches, describe
    from train.tune.plots import draw_batches

    run_recipe(bench_batches, describe, draw_batches, **options)
