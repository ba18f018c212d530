"""`alexnet bench data|startup|train|scaling`: the options; the work is imported when a command runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

PATH, INT = click.Path(path_type=Path), click.IntRange
PRECISIONS = click.Choice(["auto", "bf16", "fp16", "fp32"])
MODES = ("ddp", "ddp+bf16", "hybrid")
SUBJECTS = [
    *(f"torchvision_{way}" for way in ("fp32", "amp", "bf16", "compiled", "graphs")),
    *(f"{name}{end}" for end in ("", "_compiled") for name in ("owt", "paper", "bn", "caffe")),
    *("paper_no_lrn", "paper_torch_lrn", "bn_no_norm", "owt_plain", "owt_deterministic", "lrn", "end_to_end"),
]
option = partial(click.option, show_default=True)
repeatable = partial(option, multiple=True)
overrides_option = partial(click.option, "--set", "overrides", multiple=True, metavar="KEY=VALUE")
images_option = partial(option, "--images", help="How many JPEGs to write.")
rounds_option = partial(option, "--rounds", "num_rounds", type=INT(1), help="Turns that every case takes.")
folder_option = click.option("--folder", type=PATH, help="Where the files are kept. Default: temporary.")
precision_option = option("--precision", type=PRECISIONS, default="auto", help="Of our networks.")
device_option = option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


def echo_report(
    report: dict[str, Any], as_json: bool, describe: Callable[..., list[str]] | None = None
) -> None:
    """Print a report as JSON, or its description, by default that of all benchmarks."""
    import msgspec

    from train.bench import harness

    lines = [] if as_json else (describe or harness.describe)(report)
    click.echo(msgspec.json.encode(report) if as_json else "\n".join(lines))


def bench_command(
    name: str, function: str, text: str, examples: str, *options: Callable[..., Any]
) -> click.Command:
    """Return a command with these options and `--json` that prints what a `module:function` reports."""

    def run(as_json: bool, **options: Any) -> None:
        module, _, attribute = function.partition(":")
        echo_report(getattr(importlib.import_module(module), attribute)(**options), as_json)

    for add in (json_option, *reversed(options)):
        add(run)
    return click.command(name, help=f"{text}\n\n\b\nalexnet bench {name}\n{examples}")(run)


data = bench_command(
    "data", "train.bench.data:bench_data",
    "Images/s of our loader against torchvision's and DALI's own, on training crops of 224.\n\n"
    "On the CPU, each loader pinned to the same cores. The loaders take turns; the figures are medians.",
    "alexnet bench data --json --images 512 --rounds 3\n"
    "alexnet bench data --only dali_gpu_shards --only dali_gpu_reader",
    folder_option,
    images_option(type=INT(128), default=2000),
    rounds_option(default=5),
    option("--batches", type=INT(1), default=15, help="Batches of 64 in each turn."),
    click.option("--only", multiple=True, metavar="LOADER", help="Measure this one. Repeatable."),
)  # fmt: skip
startup = bench_command(
    "startup", "train.bench.startup:bench_startup",
    "Seconds to the first batch, and memory, on as many files as ImageNet has: first, again, and changed.",
    "alexnet bench startup --files 20000 --json",
    folder_option,
    option("--files", type=INT(256), default=1_281_167, help="How many: hard links, which need no room."),
)  # fmt: skip
train = bench_command(
    "train", "train.bench.train:bench_train",
    "Images/s of training and its fraction of the arithmetic peak; torchvision's AlexNet beside it.\n\n"
    "The step that training would choose on this machine, on images that the device has; what it launches; "
    "end to end with the loader. Subjects take turns. Ten minutes on two cores.",
    "alexnet bench train --json --only owt --only torchvision_bf16 --rounds 3",
    repeatable("--only", type=click.Choice(SUBJECTS), metavar="SUBJECT",
               help=f"Measure this one. Repeatable; there are {', '.join(SUBJECTS)}."),
    repeatable("--batch", "batches", type=INT(2),
               help="Images of a step. Repeatable; ratios of others than the first have it in their names. "
               "Default: 128, and on a GPU 1024."),
    precision_option,
    rounds_option(default=5),
    option("--crop", "crop_px", type=INT(63), default=224, help="Side of the images."),
    folder_option,
    images_option(type=INT(2), default=2000),
    device_option,
)  # fmt: skip
scaling = bench_command(
    "scaling", "train.bench.scaling:bench_scaling",
    "Step time, efficiency and bytes sent of several ranks: plain, compressed and hybrid.\n\n"
    "Over loopback, and with --link over a wire of some rate. Ten minutes on two cores.",
    "sudo alexnet bench scaling --ranks 2 --link 500mbit --json",
    option("--variant", type=click.Choice(["owt", "paper", "caffe", "bn"]), default="owt", help="Network."),
    repeatable("--mode", "modes", type=click.Choice(MODES), default=MODES, help="How to train. Repeatable."),
    repeatable("--ranks", type=INT(1, 64), default=(1, 2, 4), help="How many. Repeatable."),
    repeatable("--link", "links", metavar="RATE",
               help="Measure on two hosts, too, joined by a wire of this rate, such as 1gbit: network "
               "namespaces on this machine, which take root on Linux. Repeatable."),
    option("--batch", "rank_batch", type=INT(2), default=64, help="Of a rank."),
    option("--crop", "crop_px", type=INT(22), default=224),
    option("--classes", "num_classes", type=INT(2), default=1000),
    precision_option,
    device_option,
    rounds_option(default=3),
    option("--steps", type=INT(1), default=3, help="Timed in each turn."),
    overrides_option(help="As in training. Repeatable."),
)  # fmt: skip
