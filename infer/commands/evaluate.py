"""The command `alexnet evaluate`. Imports its work inside its body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from data_pipeline.common.errors import EXIT_SOME_UNREADABLE

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("model", metavar="[CHECKPOINT|BUNDLE]", type=PATH, required=False)
@click.option("--data", type=PATH, help="Folder with the split. Default: what it was trained on.")
@click.option("--split", default="val", show_default=True, help="Which folder of the data.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--ten-crop", is_flag=True, help="Average the softmax of the paper's ten views of each image.")
@click.option("--csv", type=PATH, help="Folder for classes.csv, confusion.csv and mistakes.csv.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate(
    model: Path | None, data: Path | None, split: str, device: Any, ten_crop: bool, csv: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Loss, top-1 and top-5 of a checkpoint or of an exported model, and what it gets wrong.

    Default: the best checkpoint of the newest run.

    \b
    alexnet evaluate
    alexnet evaluate runs/demo-20260101T000000Z/export/onnx-fp32 --json
    """
    import msgspec

    from data_pipeline.results.class_report import check_csv_folder, describe_report, write_csv
    from infer.bundle.load import is_bundle

    if csv is not None:
        check_csv_folder(csv, "--csv")
    if model is not None and is_bundle(model):
        from infer.evaluate import evaluate_exported

        metrics: Any
        metrics, counts, report = evaluate_exported(
            model, data, split=split, device=device, ten_crop=ten_crop
        )
    else:
        from train.checkpoints.load import find_checkpoint, load_checkpoint
        from train.evaluate import evaluate_checkpoint, load_split

        checkpoint = load_checkpoint(find_checkpoint(model))
        click.echo(f"checkpoint: {checkpoint.description}", err=True)
        if checkpoint.config.ten_crop and not ten_crop:
            click.echo("its run was judged by ten views of each image, as --ten-crop does", err=True)
        dataset = load_split(checkpoint, data, split)
        metrics, counts, report = evaluate_checkpoint(checkpoint, dataset, device=device, ten_crop=ten_crop)
    if csv is not None:
        write_csv(csv, counts, report)
    if as_json:
        click.echo(msgspec.json.encode(msgspec.to_builtins(metrics) | msgspec.to_builtins(report)))
    else:
        click.echo(
            f"top-1 {metrics.top1:.2%}, top-5 {metrics.top5:.2%}, loss {metrics.loss:.4f} "
            f"on {metrics.num_samples} images ({metrics.num_failed} could not be read)"
        )
        for line in describe_report(report):
            click.echo(line)
    if metrics.num_failed:
        raise click.exceptions.Exit(EXIT_SOME_UNREADABLE)
