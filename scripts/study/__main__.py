"""A study: the trainer with one change at a time: python -m scripts.study digits|tiny"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import msgspec

from scripts.study.runs import ROOT, Run, read_runs, train
from scripts.study.studies import STUDIES, Study, write_subset
from scripts.study.tables import draw, make_table

DOCS = ROOT / "docs"
START, END = "<!-- table -->\n", "<!-- end of table -->"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", type=click.Choice(list(STUDIES)))
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Data folder of all runs. Without it the recipe's own.",
)  # fmt: skip
@click.option(
    "--every", type=click.IntRange(1), default=1, show_default=True,
    help="Train on every n-th class of --data alone.",
)  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), help="Runs of each setting. Default: the study's own.")
@click.option("--epochs", type=click.IntRange(1), help="Of each run. Default: the study's own.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=DOCS, show_default="docs",
    help="Where study-NAME.jsonl, study-NAME.png and study-NAME.md are.",
)  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Of all runs. Repeatable.")
def main(
    name: str, data: Path | None, every: int, seeds: int | None, epochs: int | None, out: Path,
    overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Train a recipe with one change at a time, and compare the results.

    `digits` compares networks, initialisations and numbers of ranks on the demo's digits; `tiny` the choices
    of recipe tiny-imagenet-best. A run that study-NAME.jsonl has already is not made again: remove the file
    to start anew. The picture is drawn again, and the table in study-NAME.md, if that is there; it is
    printed, too.

    \b
    python -m scripts.study digits
    python -m scripts.study tiny --data data/tiny-imagenet --every 10
    """
    if every > 1 and data is None:
        raise click.UsageError("--every chooses classes of --data: name the folder")
    study = STUDIES[name]
    record = out / f"study-{name}.jsonl"
    sets = [f"epochs={epochs or study.epochs}", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        if every > 1 and data is not None:
            data = write_subset(data, Path(folder), every)
        runs = make_runs(study, record, data, seeds or study.seeds, sets)
    draw(study, runs, out / f"study-{name}.png")
    table = make_table(study, runs)
    text = out / f"study-{name}.md"
    if text.exists():
        before, _, rest = text.read_text(encoding="utf-8").partition(START)
        _, _, after = rest.partition(END)
        text.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")
    click.echo(table)


def make_runs(study: Study, record: Path, data: Path | None, seeds: int, sets: list[str]) -> list[Run]:
    """Make the runs that a study's file does not have yet, add them to it, and return all."""
    from data_pipeline.common.console import set_up_logging, show_progress

    set_up_logging()
    runs = read_runs(record)
    known = {(run.setting, run.seed) for run in runs}
    todo = [(s, seed) for seed in range(seeds) for s in study.settings if (s, seed) not in known]
    with show_progress("runs", len(todo)) as progress:
        for setting, seed in todo:
            run = train(study.recipe, data, setting, seed, sets)
            with record.open("ab") as file:
                file.write(msgspec.json.encode(run) + b"\n")
            runs.append(run)
            changes = ", ".join(setting.sets) or "the recipe"
            last = f"{run.epochs[-1].top1:.1%}" if run.epochs else "none"
            progress.advance(1, f"{changes}, seed {seed}: top-1 {last} {run.ended[:40]}")
    return runs


if __name__ == "__main__":
    main()
