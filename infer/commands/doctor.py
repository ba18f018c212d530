"""The command `alexnet doctor`. Imports its work inside its body."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping

PATH = click.Path(path_type=Path)


@click.command()
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
