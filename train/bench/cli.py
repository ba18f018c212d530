"""`alexnet bench data|startup|train|scaling`. Every command imports its work inside its body."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
INT = click.IntRange
NETWORKS = click.Choice(["owt", "paper", "caffe", "bn"])
MODES = ("ddp", "ddp+bf16", "hybrid")
PRECISIONS = ["bf16", "fp16", "fp32"]
SUBJECTS = [
    *(f"torchvision_{way}" for way in ("fp32", "amp", "bf16", "compiled", "graphs")),
    *(f"{name}{end}" for end in ("", "_compiled") for name in ("owt", "paper", "bn", "caffe")),
    *("paper_no_lrn", "paper_torch_lrn", "bn_no_norm", "owt_plain", "owt_deterministic", "lrn", "end_to_end"),
]
option = partial(click.option, show_default=True)
repeatable = partial(option, multiple=True)
overrides_option = partial(click.option, "--set", "overrides", multiple=True, metavar="KEY=VALUE")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
device_option = option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")


def folder_option(what: str) -> Callable[..., Any]:
    """Return `--folder`, where a benchmark keeps its files."""
    text = f"Where the {what} are kept. Default: a temporary folder."
    return click.option("--folder", type=PATH, help=text)


def images_option(*names: str, at_least: int, default: int) -> Callable[..., Any]:
    """Return `--images`, how many synthetic JPEGs a benchmark writes."""
    return option("--images", *names, type=INT(at_least), default=default, help="How many JPEGs to write.")


def rounds_option(default: int, text: str) -> Callable[..., Any]:
    """Return `--rounds`, how often every case is measured."""
    return option("--rounds", "num_rounds", type=INT(1), default=default, help=text)


def echo_report(
    report: dict[str, Any], as_json: bool, describe: Callable[..., list[str]] | None = None
) -> None:
    """Print a report as JSON, or its description, by default that of all benchmarks."""
    import msgspec

    from train.bench import harness

    lines = [] if as_json else (describe or harness.describe)(report)
    click.echo(msgspec.json.encode(report) if as_json else "\n".join(lines))


@click.command()
@folder_option("images")
@images_option(at_least=128, default=2000)
@rounds_option(5, "Turns that every loader takes.")
@option("--batches", type=INT(1), default=15, help="Batches of 64 in each turn.")
@click.option("--only", multiple=True, metavar="LOADER", help="Measure this one; may be given several times.")
@json_option
def data(as_json: bool, **options: Any) -> None:
    """Images/s of our loader against torchvision's and DALI's own, on training crops of 224.

    On the CPU, each loader pinned to the same cores. The loaders take turns; the figures are medians.

    \b
    alexnet bench data
    alexnet bench data --json --images 512 --rounds 3
    alexnet bench data --only dali_gpu_shards --only dali_gpu_reader
    """
    from train.bench.data import bench_data

    echo_report(bench_data(**options), as_json)


@click.command()
@folder_option("files")
@option("--files", type=INT(256), default=1_281_167, help="How many to make: hard links, which need no room.")
@json_option
def startup(as_json: bool, **options: Any) -> None:
    """Seconds to the first batch, and memory, on as many files as ImageNet has: first, again, and changed.

    \b
    alexnet bench startup
    alexnet bench startup --files 20000 --json
    """
    from train.bench.startup import bench_startup

    echo_report(bench_startup(**options), as_json)


@click.command()
@click.option(
    "--only", multiple=True, type=click.Choice(SUBJECTS), metavar="SUBJECT",
    help=f"Measure this one. Repeatable; there are {', '.join(SUBJECTS)}.",
)  # fmt: skip
@click.option(
    "--batch", "batches", multiple=True, type=INT(2),
    help="Images of a step. Repeatable; ratios of others than the first have it in their names. "
    "Default: 128, and on a GPU 1024.",
)  # fmt: skip
@option("--precision", type=click.Choice(["auto", *PRECISIONS]), default="auto", help="Of our networks.")
@rounds_option(5, "Turns that every subject takes.")
@option("--crop", "crop_px", type=INT(63), default=224, help="Side of the images.")
@folder_option("JPEGs")
@images_option(at_least=2, default=2000)
@device_option
@json_option
def train(as_json: bool, **options: Any) -> None:
    """Images/s of training and its fraction of the arithmetic peak; torchvision's AlexNet beside it.

    The step that training would choose on this machine, on images that the device has; what it launches; end
    to end with the loader. Subjects take turns. Ten minutes on two cores.

    \b
    alexnet bench train
    alexnet bench train --json --only owt --only torchvision_bf16 --rounds 3
    """
    from train.bench.train import bench_train

    echo_report(bench_train(**options), as_json)


@click.command()
@option("--variant", type=NETWORKS, default="owt", help="The network.")
@repeatable("--mode", "modes", type=click.Choice(MODES), default=MODES, help="A way to train. Repeatable.")
@repeatable("--ranks", type=INT(1, 64), default=(1, 2, 4), help="How many. Repeatable.")
@click.option(
    "--link", "links", multiple=True, metavar="RATE",
    help="Measure on two hosts, too, joined by a wire of this rate, such as 1gbit: network namespaces on "
    "this machine, which take root on Linux. Repeatable.",
)  # fmt: skip
@option("--batch", "rank_batch", type=INT(2), default=64, help="Of a rank.")
@option("--crop", "crop_px", type=INT(22), default=224)
@option("--classes", "num_classes", type=INT(2), default=1000)
@option("--precision", type=click.Choice(["auto", *PRECISIONS]), default="auto")
@device_option
@rounds_option(3, "Turns of every mode.")
@option("--steps", type=INT(1), default=3, help="Timed in each turn.")
@overrides_option(help="As in training. Repeatable.")
@json_option
def scaling(as_json: bool, **options: Any) -> None:
    """Step time, efficiency and bytes sent of several ranks: plain, compressed and hybrid.

    Over loopback, and with --link over a wire of some rate. Ten minutes on two cores.

    \b
    alexnet bench scaling
    sudo alexnet bench scaling --ranks 2 --link 500mbit --json
    """
    from train.bench.scaling import bench_scaling

    echo_report(bench_scaling(**options), as_json)
