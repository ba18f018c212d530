"""`alexnet bench`: the group of all benchmarks, and `infer`, whose work is imported when it runs."""

from __future__ import annotations

import click

from train.bench import cli
from train.bench.cli import INT, option, repeatable
from train.tune.cli import batch, lr

MODELS, PRECISIONS = click.Choice(["owt", "paper"]), click.Choice(["fp32", "fp16", "int8"])
infer = cli.bench_command(
    "infer", "infer.bench.predict:bench_infer",
    "Images/s of prediction, phase by phase and end to end, against a plain loop; the first row's time.\n\n"
    "Models with random weights go through export and gate first. Ten minutes on two cores.",
    "alexnet bench infer --json --model owt --batch 32 --rounds 3",
    repeatable("--model", "models", type=MODELS, default=("owt", "paper"), help="A network. Repeatable."),
    repeatable("--precision", "precisions", type=PRECISIONS, default=("fp32", "int8"), help="Repeatable."),
    repeatable("--batch", "batches", type=INT(1, 256), default=(1, 8, 32, 128, 256),
               help="Images of a batch. Repeatable; the ratios are for 32."),
    cli.folder_option,
    cli.images_option("num_images", type=INT(10), default=1000),
    cli.rounds_option(default=5, help="Turns at a batch of 32."),
    option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu"),
)  # fmt: skip
bench = click.Group(
    "bench",
    commands=[batch, cli.data, infer, lr, cli.scaling, cli.startup, cli.train],
    help="Measure this machine: each command compares in one run and reports ratios.",
)
