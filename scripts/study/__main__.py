"""A study: the trainer with one change at a time: python -m scripts.study digits|tiny|fine-tuning"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import click
import msgspec

from scripts.study.runs import ROOT, Run, read_runs, train, train_source
from scripts.study.studies import STUDIES, Study, write_other_classes, write_subset
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
    help="Where study-NAME.jsonl, study-NAME.png and the page with the table are.",
)  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Of all runs. Repeatable.")
def main(
    name: str, data: Path | None, every: int, seeds: int | None, epochs: int | None, out: Path,
    overrides: tuple[str, ...],
) -> None:  # fmt: skip
    """Train a recipe with one change at a time, and compare the results.

    `digits` compares networks, initialisations and numbers of ranks on the demo's digits; `tiny` the choices
    of recipe tiny-imagenet-best; `fine-tuning` training from scratch with training that begins with a run on
    other classes of --data, which is made first and kept in runs/. A run that study-NAME.jsonl has already
    is not made again: remove the file to start anew. The picture is drawn again, and the table in the
    study's page, if that is there; it is printed, too.

    \b
    python -m scripts.study digits
    python -m scripts.study tiny --data data/tiny-imagenet --every 10
    python -m scripts.study fine-tuning --data data/tiny-imagenet --every 20
    """
    if every > 1 and data is None:
        raise click.UsageError("--every chooses classes of --data: name the folder")
    study = STUDIES[name]
    if study.source_epochs and (data is None or every < 4):
        raise click.UsageError(
            f"{name} trains on other classes of --data first: leave some with --every 4 or more"
        )
    record = out / f"study-{name}.jsonl"
    sets = [f"epochs={epochs or study.epochs}", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        chosen = Path(folder) / "chosen"
        images = write_subset(data, chosen, every) if data is not None and every > 1 else data

        def make_source() -> Path:
            assert data is not None
            others = write_other_classes(data, Path(folder) / "others", every)
            own = [f"epochs={study.source_epochs}", *overrides]
            return train_source(study.recipe, others, ROOT / "runs" / f"study-{name}", own)

        runs = make_runs(study, record, images, seeds or study.seeds, sets, make_source)
    draw(study, runs, out / f"study-{name}.png")
    table = make_table(study, runs)
    text = out / study.page
    if text.exists():
        before, _, rest = text.read_text(encoding="utf-8").partition(START)
        _, _, after = rest.partition(END)
        text.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")
    click.echo(table)


def make_runs(
    study: Study, record: Path, data: Path | None, seeds: int, sets: list[str],
    make_source: Callable[[], Path],
) -> list[Run]:  # fmt: skip
    """Make the runs that a study's file does not have yet, add them to it, and return all.

    Args:
        make_source: makes the run that others begin with, where the study has such and any is missing.
    """
    from data_pipeline.common.console import set_up_logging, show_progress

    set_up_logging()
    runs = read_runs(record)
    known = {(run.setting, run.seed) for run in runs}
    todo = [(s, seed) for seed in range(seeds) for s in study.settings if (s, seed) not in known]
    source = make_source() if todo and study.source_epochs else None
    with show_progress("runs", len(todo)) as progress:
        for setting, seed in todo:
            run = train(study.recipe, data, setting, seed, sets, source)
            with record.open("ab") as file:
                file.write(msgspec.json.encode(run) + b"\n")
            runs.append(run)
            changes = ", ".join(setting.sets) or "the recipe"
            last = f"{run.epochs[-1].top1:.1%}" if run.epochs else "none"
            progress.advance(1, f"{changes}, seed {seed}: top-1 {last} {run.ended[:40]}")
    return runs


if __name__ == "__main__":
    main()
