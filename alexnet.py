"""The command line. Every command imports its work inside its body, so that `--help` starts at once."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping

EXIT_WRONG_USE = 2
EXIT_SOME_UNREADABLE = 3

GROUPS = {
    "bench": "infer.bench.cli",
    "checkpoint": "train.cli",
    "data": "data_pipeline.cli",
}
"""Groups of commands, and the modules that declare them; these import nothing but click."""

TRAINING_PACKAGES = {"torch", "torchvision", "onnx", "onnxscript", "tensorboard", "sklearn"}
"""What a machine that only serves does not have."""

PATH = click.Path(path_type=Path)
HELP = {"help_option_names": ["-h", "--help"]}


class FrontDoor(click.Group):
    """Commands declared here, and groups that are imported when they are named.

    A failure is one line on stderr and an exit code; a traceback comes only with `--debug`.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, sorted."""
        return sorted([*super().list_commands(ctx), *GROUPS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One command; imports the module of a group."""
        if cmd_name not in GROUPS:
            return super().get_command(ctx, cmd_name)
        group = getattr(importlib.import_module(GROUPS[cmd_name]), cmd_name)
        assert isinstance(group, click.Group)
        return group

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn an exception into its line and code."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            from data_pipeline.common.text import visible

            code = getattr(error, "exit_code", None)
            if isinstance(error, ModuleNotFoundError) and error.name in TRAINING_PACKAGES:
                code = EXIT_WRONG_USE
                click.echo(f"error: {error.name} is not installed: pip install 'alexnet[train]'", err=True)
            elif code is None:
                what = visible((str(error).splitlines() or [""])[0])
                click.echo(f"error: {type(error).__name__}: {what} (traceback: alexnet --debug …)", err=True)
            else:
                click.echo(f"error: {visible(str(error))}", err=True)
            raise click.exceptions.Exit(code or 1) from error


@click.group(cls=FrontDoor, context_settings=HELP)
@click.version_option(package_name="alexnet", prog_name="alexnet")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """AlexNet: train on many GPUs, export to ONNX and TensorRT, predict.

    \b
    Exit codes: 0 all good; 1 failure; 2 wrong use; 3 finished, but some inputs could not
    be read; 4 an exported model does not agree with its checkpoint; 75 training was asked
    to stop and has saved its state.
    """
    from data_pipeline.common.console import set_up_logging

    set_up_logging()


class TrainCommand(click.Command):
    """Takes its options from the trainer, which is imported only when they are wanted."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Those of `train.main`, and those declared here."""
        from train.cli import OPTIONS

        return [*OPTIONS, *super().get_params(ctx)]


@main.command(cls=TrainCommand)
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
    from train.distributed.torchrun import (
        choose_rank_count,
        rendezvous_options,
        run_torchrun,
        training_arguments,
    )

    config = make_config(options["recipe"], options["overrides"], options["data"])
    if print_config:
        click.echo(to_json(config))
        return
    arguments = training_arguments(**options, debug=debug)
    rendezvous = rendezvous_options(nnodes, rdzv_endpoint, rdzv_id)
    code = run_torchrun(choose_rank_count(nproc, config), arguments, max_restarts, rendezvous)
    if code:
        raise click.exceptions.Exit(code)


@main.command()
@click.argument("model", metavar="[CHECKPOINT|BUNDLE]", type=PATH, required=False)
@click.option("--data", type=PATH, help="Folder with the split. Default: what it was trained on.")
@click.option("--split", default="val", show_default=True, help="Which folder of the data.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--ten-crop", is_flag=True, help="Average the softmax of the paper's ten views of each image.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    model: Path | None, data: Path | None, split: str, device: Any, ten_crop: bool, as_json: bool
) -> None:
    """Loss, top-1 and top-5 of a checkpoint or of an exported model.

    Default: the best checkpoint of the newest run.

    \b
    alexnet evaluate
    alexnet evaluate runs/demo-20260101T000000Z/export/onnx-fp32 --json
    """
    import dataclasses

    import msgspec

    if model is not None and ((model / "bundle.json").exists() or model.name == "bundle.json"):
        from infer.evaluate import evaluate_exported

        metrics = msgspec.structs.asdict(
            evaluate_exported(model, data, split=split, device=device, ten_crop=ten_crop)
        )
    else:
        from train.checkpoints.load import find_checkpoint, load_checkpoint
        from train.evaluate import evaluate_checkpoint, load_split

        checkpoint = load_checkpoint(find_checkpoint(model))
        click.echo(f"checkpoint: {checkpoint.description}", err=True)
        if checkpoint.config.ten_crop and not ten_crop:
            click.echo("its run was judged by ten views of each image, as --ten-crop does", err=True)
        metrics = dataclasses.asdict(
            evaluate_checkpoint(
                checkpoint, load_split(checkpoint, data, split), device=device, ten_crop=ten_crop
            )
        )
    if as_json:
        click.echo(msgspec.json.encode(metrics))
    else:
        click.echo(
            f"top-1 {metrics['top1']:.2%}, top-5 {metrics['top5']:.2%}, loss {metrics['loss']:.4f} "
            f"on {metrics['num_samples']} images ({metrics['num_failed']} could not be read)"
        )
    if metrics["num_failed"]:
        raise click.exceptions.Exit(EXIT_SOME_UNREADABLE)


@main.command()
@click.argument("source", metavar="[CHECKPOINT|BUNDLE]", type=PATH, required=False)
@click.option(
    "--format", "formats", metavar="onnx|trt|onnx,trt",
    help="ONNX (the default), or a TensorRT engine with the ONNX file beside it, or a bundle of each. "
    "Of a BUNDLE, trt builds the engine again from its ONNX file.",
)  # fmt: skip
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "int8"]),
    help="Of weights and arithmetic; LRN and softmax stay in float32. Default: fp32.",
)  # fmt: skip
@click.option(
    "--calibrate", type=PATH,
    help="Folder with train/ for int8's ranges. Default: what it was trained on.",
)  # fmt: skip
@click.option("--max-batch", type=int, help="Largest batch the model takes. Default: 64, or the bundle's.")
@click.option("--opt-batch", type=int, help="Batch that the engine is tuned for. Default: 32 or the largest.")
@click.option("--builder-level", type=int, help="0 builds soonest, 5 searches longest. Default: 3.")
@click.option(
    "--timing-cache",
    type=PATH,
    help="TensorRT's kernel timings, read and written: the next build is shorter.",
)
@click.option("--gpu", default="", metavar="sm89,…", help="Build the engine for these GPUs only.")
@click.option(
    "--out", type=PATH,
    help="Folder to write; with two formats, the folder of both. Default: export/<format>-<precision>, or "
    "the bundle's own.",
)  # fmt: skip
@click.option("--data", type=PATH, help="Folder with val/ for the gate. Default: what it was trained on.")
@click.option("--triton", type=PATH, metavar="DIR", help="Write models for Triton Inference Server as well.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the bundle's manifest as JSON; of two formats, both by name.",
)
def export(as_json: bool, **options: Any) -> None:
    """Export a checkpoint to ONNX or TensorRT, if it agrees with the checkpoint on validation images.

    Default: the best checkpoint of the newest run. Of a BUNDLE, --format trt builds the engine for
    this machine from the ONNX file in it, and --triton writes a model repository.

    \b
    alexnet export --format onnx
    alexnet export --format onnx,trt --precision int8 --max-batch 128
    alexnet export --format trt --precision fp16 --gpu sm89,sm120 --builder-level 5
    alexnet export runs/demo-20260101T000000Z/export/trt-fp32 --format trt
    """
    import msgspec

    from infer.bundle.describe import describe_export
    from infer.commands.export import ExportOptions
    from infer.commands.export import export as run_export

    made = run_export(ExportOptions(**options))
    for model in made.triton:
        click.echo(f"triton model: {model}", err=as_json)
    if as_json:
        manifests = {format: bundle.manifest for format, bundle in made.bundles.items()}
        one = next(iter(manifests.values())) if len(manifests) == 1 else manifests
        click.echo(msgspec.json.format(msgspec.json.encode(one)))
        return
    for bundle in made.bundles.values():
        for line in describe_export(bundle):
            click.echo(line)


@main.command()
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
@click.option("--html", type=PATH, help="Write a gallery besides, to sort and filter in a browser.")
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

    PATH is an image, a folder, a tar shard, a glob, @list.txt (a file of paths), or - (a list on
    stdin). One row for each input, in order; what cannot be read is a row with the reason.

    \b
    alexnet predict images/
    alexnet predict images/ --output rows.jsonl --html gallery.html
    find /data -name '*.jpg' -print0 | alexnet predict - --output rows.parquet --resume
    alexnet predict shards/*.tar --engine ray --output rows/ --workers 8 --resume
    """
    from concurrent.futures import ThreadPoolExecutor

    from infer.bundle.load import open_bundle

    with ThreadPoolExecutor(1, thread_name_prefix="verify") as pool:
        # Hashing a model and importing what runs it take about as long, and the one needs no interpreter.
        verified = pool.submit(open_bundle, options["model"])
        from infer.commands.predict import predict_images
        from infer.predict.options import PredictOptions

        summary = predict_images(PredictOptions(**options), verified.result)
    if summary.errors + summary.kept_errors:
        raise click.exceptions.Exit(EXIT_SOME_UNREADABLE)


@main.command()
@click.argument("bundle", type=PATH, required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(bundle: Path | None, as_json: bool) -> None:
    """What this machine has, and what training and prediction would use here.

    Of a BUNDLE: whether its files are what was exported, where it comes from, how the gate judged it,
    which GPUs and libraries load it, and what of it loads and runs here. Code 1 if it is damaged.

    \b
    alexnet doctor
    alexnet doctor runs/demo-20260101T000000Z/export/trt-fp32
    """
    import msgspec

    if bundle is not None:
        from infer.doctor.bundle import examine_bundle, report_lines

        found = examine_bundle(bundle)
        if as_json:
            click.echo(msgspec.json.format(msgspec.json.encode(found)))
        else:
            click.echo("\n".join(report_lines(found)))
        if not found.healthy:
            click.echo("error: the bundle is damaged: export the checkpoint again", err=True)
            raise click.exceptions.Exit(1)
        return
    from infer.doctor.machine import examine

    report = examine()
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)))
        return
    for section, values in report.items():
        _print_section(section, values)


def _print_section(name: str, values: Mapping[str, Any] | list[Any]) -> None:
    if isinstance(values, list):
        click.echo(f"{name}: {'none' if not values else ''}".rstrip())
        for value in values:
            click.echo(f"  {', '.join(f'{k} {v}' for k, v in value.items())}")
        return
    click.echo(f"{name}:")
    for key, value in values.items():
        click.echo(f"  {key}: {', '.join(map(str, value)) if isinstance(value, list) else value}")


if __name__ == "__main__":
    sys.exit(main())
