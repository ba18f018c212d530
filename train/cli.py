"""The options of training, and the commands `alexnet train` and `alexnet checkpoint …`.

Imports nothing heavier than click: every command imports its work inside its body.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)
DEFAULT_RECIPE = "demo"

OPTIONS: list[click.Parameter] = [
    click.Option(
        ["--recipe"],
        default=DEFAULT_RECIPE,
        show_default=True,
        help="Name of a recipe, or a .toml or .json file.",
    ),
    click.Option(
        ["--data"],
        type=PATH,
        help="Folder with train/ and val/, one folder per class in each, or the address of shards. Default: "
        "the recipe's.",
    ),
    click.Option(
        ["--out"],
        type=PATH,
        default=Path("runs"),
        show_default=True,
        help="Folder in which the run's folder is made.",
    ),
    click.Option(
        ["--init"],
        metavar="FROM",
        help="Begin with these weights: a run, a checkpoint, a file of weights, or torchvision.",
    ),
    click.Option(
        ["--resume"],
        default="none",
        show_default=True,
        metavar="auto|none|PATH",
        help="Go on with the newest run of this recipe (auto), or with a run or checkpoint.",
    ),
    click.Option(
        ["--allow-changed-schedule"],
        is_flag=True,
        help="Resume with other epochs, rates or batch, though later steps have other rates then.",
    ),
    click.Option(
        ["--set", "overrides"],
        multiple=True,
        metavar="KEY=VALUE",
        help="Set one key of the configuration, e.g. --set schedule.learning_rate=0.02. Repeatable.",
    ),
    click.Option(["--print-config"], is_flag=True, help="Print the resolved configuration as JSON and exit."),
    click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
]
"""Options that `python -m train.main` and `alexnet train` share."""


@click.command(params=list(OPTIONS))
@click.option(
    "--nproc", default="auto", show_default=True, metavar="N|auto", help="Ranks: auto is one for each GPU."
)
@click.option(
    "--max-restarts",
    type=click.IntRange(0, 1000),
    default=0,
    show_default=True,
    help="Start all ranks again, from the run's last checkpoint, when one dies; so often at most.",
)
@click.option(
    "--nnodes", default="1", show_default=True, metavar="N|MIN:MAX", help="Machines; start it on each."
)
@click.option(
    "--rdzv-endpoint", metavar="HOST[:PORT]", help="Where several machines meet: one of them, on a free port."
)
@click.option("--rdzv-id", metavar="NAME", help="Name of this launch, the same on all its machines.")
def train(
    nproc: str,
    max_restarts: int,
    nnodes: str,
    rdzv_endpoint: str | None,
    rdzv_id: str | None,
    print_config: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Train: is torchrun for this machine, with exit code 75 where training was stopped and saved.

    For several machines, start it on each (docs/clusters.md has templates for Slurm and Kubeflow).

    \b
    alexnet train --nproc 2
    alexnet train --recipe tiny-imagenet --data tiny-imagenet-200 --max-restarts 3
    alexnet train --nnodes 2 --rdzv-endpoint node1:29400 --rdzv-id job-17
    """
    from train.config.load import make_config, to_json

    config = make_config(options["recipe"], options["overrides"], options["data"], options["init"])
    if print_config:
        click.echo(to_json(config))
        return
    from train.distributed.torchrun import (  # and torch, which takes its time
        choose_rank_count,
        rendezvous_options,
        run_torchrun,
        training_arguments,
    )

    arguments = training_arguments(**options, debug=debug)
    rendezvous = rendezvous_options(nnodes, rdzv_endpoint, rdzv_id)
    code = run_torchrun(choose_rank_count(nproc, config), arguments, max_restarts, rendezvous)
    if code:
        raise click.exceptions.Exit(code)


@click.group()
def checkpoint() -> None:
    """Checkpoints: look at them, verify them, bring weights in and out."""


@checkpoint.command()
@click.argument("checkpoint", type=PATH, required=False)
def inspect(checkpoint: Path | None) -> None:
    """Print what a checkpoint is, as JSON. Default: the best of the newest run.

    \b
    alexnet checkpoint inspect
    """
    import msgspec

    from train.checkpoints.load import find_checkpoint
    from train.weights import inspect_checkpoint

    click.echo(msgspec.json.format(msgspec.json.encode(inspect_checkpoint(find_checkpoint(checkpoint)))))


@checkpoint.command()
@click.argument("run", type=PATH)
def verify(run: Path) -> None:
    """Hold every checkpoint of a run against its manifest; code 1 if any is damaged.

    \b
    alexnet checkpoint verify runs/demo-20260101T000000Z
    """
    from data_pipeline.common.errors import CorruptFileError, UserError
    from train.checkpoints.load import verify_checkpoint
    from train.checkpoints.retention import saved_steps

    folders = list(saved_steps(run / "checkpoints").values())
    if not folders:
        raise UserError(f"{run} is not a run with checkpoints")
    damaged = 0
    for folder in folders:
        try:
            verify_checkpoint(folder)
            click.echo(f"{folder}: ok")
        except CorruptFileError as error:
            damaged += 1
            click.echo(f"{folder}: {error}")
    if damaged:
        raise CorruptFileError(f"{damaged} of {len(folders)} checkpoints are damaged")


@checkpoint.command()
@click.argument("source", type=PATH)
@click.argument("target", type=PATH)
@click.option(
    "--to", type=click.Choice(["safetensors", "torchvision"]),
    help="Take weights out: what to write. Without it, SOURCE is a file of weights that comes in.",
)  # fmt: skip
@click.option("--classes", type=PATH, help="Class names for weights that come in, one a line.")
def convert(source: Path, target: Path, to: Any, classes: Path | None) -> None:
    """Take weights out of a checkpoint, or make a checkpoint of weights from elsewhere.

    Without --to, TARGET is the folder for the new run, and SOURCE .safetensors as written here, torchvision's
    alexnet (.pth, .pt, .pth.tar, .ckpt), alone or as a trainer saved it, or BVLC's AlexNet (.onnx).

    \b
    alexnet checkpoint convert runs/demo-20260101T000000Z weights.safetensors --to safetensors
    alexnet checkpoint convert alexnet-owt.pth runs --classes imagenet.txt
    """
    from train.checkpoints.load import find_checkpoint, load_checkpoint
    from train.weights import export_weights, import_weights, read_names

    if to is not None:
        export_weights(load_checkpoint(find_checkpoint(source)), target, to)
        click.echo(target)
        return
    names = None if classes is None else read_names(classes)
    click.echo(import_weights(source, target, names))
