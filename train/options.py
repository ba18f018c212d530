"""The options that `python -m train.main` and `alexnet train` share. Imports nothing heavier than click."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., object])

DEFAULT_RECIPE = "demo"

_OPTIONS = (
    click.option(
        "--recipe",
        default=DEFAULT_RECIPE,
        show_default=True,
        help="Name of a recipe, or a .toml or .json file.",
    ),
    click.option(
        "--data",
        type=click.Path(path_type=Path),
        help="Folder with train/ and val/, one folder per class in each. Default: the recipe's, "
        "else the embedded demo data.",
    ),
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        default=Path("runs"),
        show_default=True,
        help="Folder in which the run's folder is made.",
    ),
    click.option(
        "--resume",
        default="none",
        show_default=True,
        metavar="auto|none|PATH",
        help="Go on from the newest run of this recipe (auto), or from a run or checkpoint.",
    ),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set one key of the configuration, e.g. --set schedule.learning_rate=0.02. Repeatable.",
    ),
    click.option("--print-config", is_flag=True, help="Print the resolved configuration as JSON and exit."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)


def training_options(command: Command) -> Command:
    """Add the training options to a click command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
