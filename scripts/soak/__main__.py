"""Train the demo under random faults, and check that nothing was lost: python -m scripts.soak --minutes 30"""

from __future__ import annotations

from pathlib import Path

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--minutes", type=click.FloatRange(0, 10080), required=True, help="How long, about; at least two runs."
)
@click.option(
    "--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="Of runs and faults."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("soak"), show_default=True,
    help="New folder for logs, evidence and report.json.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def main(minutes: float, seed: int, out: Path, as_json: bool) -> None:
    """Train the demo under random faults, and check that nothing was lost.

    Ranks and whole launches are killed or asked to stop, checkpoints damaged and removed, images
    corrupted, the disk filled (as root, who can mount a small one; else this is left out, and said).
    Half of the runs keep their number of ranks, and must end with the bits of an undisturbed run;
    the others change it with every launch, and must have seen every sample of every epoch once.
    docs/soak.md says how that is found out. Needs 2 cores, 4 GB of memory and 1 GB of disk.

    Exit code: 0 all good; 1 something was lost, or a fault was not survived.

    \b
    python -m scripts.soak --minutes 30
    python -m scripts.soak --minutes 2 --seed 7 --json
    """
    import msgspec

    from data_pipeline.common.console import set_up_logging
    from data_pipeline.common.errors import UserError
    from scripts.soak.campaign import soak
    from scripts.soak.report import readable

    set_up_logging()
    try:
        report = soak(minutes, seed, out.resolve())
    except UserError as error:
        raise click.UsageError(str(error)) from error
    encoded = msgspec.json.format(msgspec.json.encode(report))
    (out / "report.json").write_bytes(encoded + b"\n")
    click.echo(encoded if as_json else readable(report))
    raise SystemExit(0 if report.good else 1)


if __name__ == "__main__":
    main()
