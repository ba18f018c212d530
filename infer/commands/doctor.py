"""The command `alexnet doctor`. Imports its work inside its body."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(bundle: Path | None, as_json: bool) -> None:
    """Show what this machine has, and what training and prediction would use on it.

    Of a BUNDLE: whether its files are what was exported, where it comes from, how the gate judged it,
    which GPUs and libraries load it, and what of it loads and runs here. Code 1 if it is damaged.

    \b
    alexnet doctor
    alexnet doctor runs/demo-20260101T000000Z/export/trt-fp32
    """
    import msgspec

    found: Any
    if bundle is None:
        from infer.doctor.machine import examine

        found = examine()
        lines = [line for name, values in found.items() for line in _section_lines(name, values)]
    else:
        from infer.doctor.bundle import examine_bundle, report_lines

        found = examine_bundle(bundle)
        lines = report_lines(found)
    click.echo(msgspec.json.format(msgspec.json.encode(found)) if as_json else "\n".join(lines))
    if bundle is not None and not found.healthy:
        click.echo("error: the bundle is damaged: export the checkpoint again", err=True)
        raise click.exceptions.Exit(1)


def _section_lines(name: str, values: Mapping[str, Any] | list[Any]) -> list[str]:
    if isinstance(values, list):
        first = f"{name}: {'none' if not values else ''}".rstrip()
        return [first, *(f"  {', '.join(f'{k} {v}' for k, v in value.items())}" for value in values)]
    shown = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in values.items()}
    return [f"{name}:", *(f"  {key}: {value}" for key, value in shown.items())]
