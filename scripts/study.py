"""A study of networks, initialisations and numbers of ranks on the digits: python -m scripts.study"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import msgspec

DOCS = Path(__file__).parent.parent / "docs"
START, END = "<!-- table -->\n", "<!-- end of table -->"


class Setting(msgspec.Struct, frozen=True):
    """One setting to compare; everything else is recipe `demo`."""

    model: str
    init: str
    ranks: int


class Epoch(msgspec.Struct, frozen=True):
    """Validation after one epoch: mean loss, and fractions of the held-out digits."""

    epoch: int
    loss: float
    top1: float
    top5: float


class Run(msgspec.Struct, frozen=True):
    """One run, a line of `study.jsonl`.

    Attributes:
        epochs: the epochs that it finished.
        ended: the error that ended it early; empty where it finished.
    """

    setting: Setting
    seed: int
    epochs: list[Epoch]
    ended: str
    seconds: float


USUAL = Setting("paper", "he", 2)
"""The demo's own setting, which is part of every question."""

QUESTIONS = {
    "network": [USUAL, Setting("owt", "he", 2), Setting("bn", "he", 2)],
    "initialisation": [USUAL, *(Setting("paper", init, 2) for init in ("paper", "caffe", "torch"))],
    "ranks": [Setting("paper", "he", 1), USUAL],
}
NAMES: dict[str, Callable[[Setting], str]] = {
    "network": lambda s: s.model,
    "initialisation": lambda s: s.init,
    "ranks": lambda s: f"{s.ranks} rank{'s' if s.ranks > 1 else ''}",
}


def settings() -> list[Setting]:
    """Every setting once, however many questions it answers."""
    return list(dict.fromkeys(setting for group in QUESTIONS.values() for setting in group))


def train(setting: Setting, seed: int, overrides: Sequence[str]) -> Run:
    """Run the trainer itself on the demo's digits.

    Raises:
        RuntimeError: the run failed, and not because its loss was flat.
    """
    sets = [f"model.name={setting.model}", f"model.init={setting.init}", f"seed={seed}", *overrides]
    command = [sys.executable, "-m", "alexnet", "train", "--nproc", str(setting.ranks), "--resume", "none"]
    command += [f"--set={text}" for text in sets]
    with tempfile.TemporaryDirectory() as out:
        started = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
        done = subprocess.run(
            [*command, "--out", out], cwd=DOCS.parent, env=environment, capture_output=True, text=True
        )
        ended = next((line for line in done.stderr.splitlines() if line.startswith("error: ")), "")
        if done.returncode != 0 and "ln(" not in ended:
            raise RuntimeError(f"{setting}, seed {seed}: {done.stderr[-2000:]}")
        (metrics,) = Path(out).glob("*/metrics.jsonl")
        rows = [msgspec.json.decode(line) for line in metrics.read_bytes().splitlines()]
        return Run(
            setting=setting,
            seed=seed,
            epochs=[msgspec.convert(row, Epoch) for row in rows if row["split"] == "val"],
            ended=ended.removeprefix("error: ").partition(". ")[0],  # the rest names folders
            seconds=round(time.monotonic() - started, 1),
        )


def read_runs(path: Path) -> list[Run]:
    """Read the runs made so far; none where there is no file."""
    return msgspec.json.Decoder(Run).decode_lines(path.read_bytes()) if path.exists() else []


def describe_spread(values: Sequence[float]) -> str:
    """Format fractions as percent: mean and range.

    >>> describe_spread([0.99, 0.97, 0.98])
    '98.0% (97.0 to 99.0)'
    """
    low, high = (f"{100 * value:.1f}" for value in (min(values), max(values)))
    return f"{100 * statistics.mean(values):.1f}% ({low} to {high})"


def first_epoch_above(run: Run, top1: float) -> int | None:
    """The first epoch with at least this held-out top-1; None where there is none."""
    return next((epoch.epoch for epoch in run.epochs if epoch.top1 >= top1), None)


def make_table(runs: Sequence[Run], total_epochs: int) -> str:
    """Format the runs by setting as Markdown: means and ranges over the seeds."""
    lines = [
        "| question | setting | runs | top-1 after the last epoch: mean (range) | mean of the best epochs | "
        "first epoch above 90%, by seed | ended early |",
        "|---|---|---|---|---|---|---|",
    ]
    for question, group in QUESTIONS.items():
        for setting in group:
            seeds = sorted((run for run in runs if run.setting == setting), key=lambda run: run.seed)
            whole = [run for run in seeds if not run.ended]
            ended = [str(run.epochs[-1].epoch) for run in seeds if run.ended]
            last = describe_spread([run.epochs[-1].top1 for run in whole]) if whole else "-"
            bests = [max(epoch.top1 for epoch in run.epochs) for run in whole]
            best = f"{100 * statistics.mean(bests):.1f}%" if bests else "-"
            first = ", ".join(str(first_epoch_above(run, 0.9) or "never") for run in seeds)
            early = f"{len(ended)} of {len(seeds)}, flat, in epoch {', '.join(ended)}" if ended else "none"
            cells = [question, NAMES[question](setting), str(len(seeds)), last, best, first, early]
            lines.append(f"| {' | '.join(cells)} |")
    seconds = sum(run.seconds for run in runs)
    lines += ["", f"{len(runs)} runs of {total_epochs} epochs at most, {seconds / 60:.0f} minutes together."]
    return "\n".join(lines) + "\n"


def draw(runs: Sequence[Run], path: Path, total_epochs: int) -> None:
    """Draw a panel for each question: the held-out top-1 by epoch, mean and range over the seeds."""
    from train.tune.plots import COLORS, draw_panels

    with draw_panels(path, len(QUESTIONS)) as panels:
        for panel, (question, group) in zip(panels, QUESTIONS.items(), strict=True):
            for setting, color, style in zip(group, COLORS, ("-", "--", "-.", ":"), strict=False):
                seeds = [run for run in runs if run.setting == setting]
                # A run that ended early is drawn as far as it went, and so the mean is over fewer seeds.
                epochs = range(1, max((len(run.epochs) for run in seeds), default=0) + 1)
                by_epoch = [[100 * r.epochs[e - 1].top1 for r in seeds if len(r.epochs) >= e] for e in epochs]
                means, lows, highs = ([f(v) for v in by_epoch] for f in (statistics.mean, min, max))
                flat = sum(bool(run.ended) for run in seeds)
                name = NAMES[question](setting) + (f" ({flat} of {len(seeds)} ended: flat)" if flat else "")
                panel.plot(epochs, means, style, color=color, label=name)
                panel.fill_between(epochs, lows, highs, color=color, alpha=0.15, lw=0)
            panel.set(xlabel="epoch", ylim=(0, 102), xlim=(1, max(2, total_epochs)), title=question)
            panel.legend(loc="center right" if question == "initialisation" else "lower right", fontsize=8)
        panels[0].set_ylabel("top-1 of 355 held-out digits, %")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Runs of each setting.")
@click.option("--epochs", type=click.IntRange(1), default=8, show_default=True, help="Of each run.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=DOCS, show_default="docs",
    help="Where study.jsonl, study.png and study.md are.",
)  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Of all runs. Repeatable.")
def main(seeds: int, epochs: int, out: Path, overrides: tuple[str, ...]) -> None:
    """Train the demo with each network, initialisation and number of ranks, several seeds each.

    A run that study.jsonl has already is not made again: remove the file to start anew. The picture is drawn
    again, and the table in study.md, if that is there; it is printed, too.

    \b
    python -m scripts.study
    python -m scripts.study --seeds 1 --epochs 2 --out /tmp
    """
    from data_pipeline.common.console import set_up_logging, show_progress

    set_up_logging()
    record = out / "study.jsonl"
    runs = read_runs(record)
    known = {(run.setting, run.seed) for run in runs}
    todo = [(s, seed) for seed in range(seeds) for s in settings() if (s, seed) not in known]
    with show_progress("runs", len(todo)) as progress:
        for setting, seed in todo:
            run = train(setting, seed, [f"epochs={epochs}", *overrides])
            with record.open("ab") as file:
                file.write(msgspec.json.encode(run) + b"\n")
            runs.append(run)
            progress.advance(1, f"{setting}, seed {seed}: top-1 {run.epochs[-1].top1:.1%} {run.ended[:40]}")
    draw(runs, out / "study.png", epochs)
    table = make_table(runs, epochs)
    text = out / "study.md"
    if text.exists():
        before, _, rest = text.read_text(encoding="utf-8").partition(START)
        _, _, after = rest.partition(END)
        text.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")
    click.echo(table)


if __name__ == "__main__":
    main()
