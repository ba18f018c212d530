"""`alexnet data …`. Every command imports its work inside its body."""

from __future__ import annotations

from pathlib import Path

import click

PATH = click.Path(path_type=Path)


@click.group()
def data() -> None:
    """Data sets."""


@data.command()
@click.argument("folder", metavar="[DIR]", type=PATH, required=False)
def demo(folder: Path | None) -> None:
    """Write the demo data: 1,797 handwritten digits as 64-pixel JPEGs, in train/ and val/.

    \b
    alexnet data demo
    """
    from data_pipeline.demo import DEMO_ROOT, write_demo

    write_demo(folder or DEMO_ROOT)
    click.echo(folder or DEMO_ROOT)
