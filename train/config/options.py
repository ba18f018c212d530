"""The options that `python -m train.main` and `alexnet train` share. Imports nothing heavier than click."""

from __future__ import annotations

from pathlib import Path

import click

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
        type=click.Path(path_type=Path),
        help="Folder with train/ and val/, one folder per class in each. Default: the recipe's.",
    ),
    click.Option(
        ["--out"],
        type=click.Path(path_type=Path),
        default=Path("runs"),
        show_default=True,
        help="Folder in which the run's folder is made.",
    ),
    click.Option(
        ["--resume"],
        default="none",
        show_default=True,
        metavar="auto|none|PATH",
        help="Go on with the newest run of this recipe (auto), or with a run or checkpoint.",
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
