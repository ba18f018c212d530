"""The command `alexnet report`. Imports its work inside its body."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("model", metavar="[RUN|BUNDLE]", type=PATH, required=False)
@click.option(
    "--output",
    type=PATH,
    metavar="FILE.html",
    help="The file to write. Default: report.html in the run; an earlier report is replaced.",
)
@click.option(
    "--data", type=PATH, help="Folder with val/, for the pictures. Default: what it was trained on."
)
def report(model: Path | None, output: Path | None, data: Path | None) -> None:
    """One HTML file that shows a run: curves, filters, pictures, classes, mistakes, configuration, speed.

    It needs no other file and no network. What needs images or a checkpoint says so where they are gone.
    Default: the newest run.

    \b
    alexnet report
    alexnet report runs/demo-20260101T000000Z --output demo.html
    """
    from infer.report.write import write_report

    click.echo(write_report(model, output, data))
