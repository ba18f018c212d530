"""The trainer's front door: `torchrun --nproc_per_node=2 -m train.main`."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import msgspec
from torch.distributed.elastic.multiprocessing.errors import record

from data_pipeline.common.console import set_up_logging
from data_pipeline.common.errors import DivergedError, InterruptedRunError, RankLostError, line_of
from data_pipeline.common.files import check_writable
from data_pipeline.common.streams import (
    EXIT_BROKEN_PIPE,
    require_utf8,
    set_up_streams,
    silence_broken_streams,
)
from data_pipeline.common.text import visible
from data_pipeline.datasets.demo import DEMO_ROOT
from train.cli import DEFAULT_RECIPE, OPTIONS
from train.config.load import make_config, to_json
from train.config.schema import RunConfig
from train.distributed.torchrun import env_launch
from train.distributed.world import env_rank, open_world
from train.health.metrics import Metrics
from train.health.signals import Interrupt
from train.loop import run_epochs
from train.runs.card import share_best
from train.runs.resume import end_run
from train.setup import build_run
from train.state import RunState

log = logging.getLogger("train")

MAIN_RANK_FIRST_S = 5.0
"""Seconds for which the other ranks hold back an error. Most errors occur on every rank: rank 0 logs its own,
exits, and torchrun ends the others within this time. An error of one rank alone is logged after it. No
collective can replace the wait: after an error the ranks need not be at the same one."""


def train(config: RunConfig, out: Path, resume: str, *, allow_changed_schedule: bool = False) -> str | None:
    """Train as configured, on the ranks that torchrun started (outside torchrun: one).

    Args:
        config, out, resume, allow_changed_schedule: see `build_run`.
    Returns:
        On rank 0, the result as one JSON object, see `summarize`.
    Raises:
        UserError, CorruptFileError: each with what is wrong, where, and what to do.
    """
    with ExitStack() as stack:
        interrupt = stack.enter_context(closing(Interrupt()))  # closed last: it ignores a second signal
        world = stack.enter_context(
            open_world(config.device, config.timeout_s, deterministic=config.deterministic)
        )
        if resume in ("none", "auto"):  # else the run may lie elsewhere
            world.broadcast_object(lambda: check_writable(out, "name another folder with --out"))
        run = build_run(
            config, out, resume, world, stack, interrupt, allow_changed_schedule=allow_changed_schedule
        )
        started = time.monotonic()
        try:
            metrics = run_epochs(run)
        except (InterruptedRunError, DivergedError) as error:
            if run.folder is not None:
                end_run(run.folder, env_launch(), error)
            raise
        if not world.is_main:
            return None
        summary = summarize(run, metrics, time.monotonic() - started)
        assert run.folder is not None and run.writer is not None
        share_best(run.folder.path, run.writer.best)
        return msgspec.json.encode(summary).decode()


def summarize(run: RunState, metrics: Metrics | None, seconds: float) -> dict[str, Any]:
    """Collect the result of a run on rank 0.

    Args:
        metrics: the last validation metrics, if there are any.
        seconds: that training took.
    Returns:
        Run, step, best top-1, how many images of each split the quarantine list left out, skipped steps, how
        many checkpoints were written and for what share of the time they held training up, and the metrics.
    """
    assert run.folder is not None and run.writer is not None
    return {
        "run": str(run.folder.path),
        "step": run.step,
        "best": run.writer.best,
        "num_quarantined": {split: contents.num_quarantined for split, contents in run.data.items()},
        "skipped_steps": run.skipped,
        "checkpoints": {
            "num_saved": run.writer.num_saved,
            "held_up_s": run.held_up_s,
            "held_up_share": run.held_up_s / seconds,
        },
        **(asdict(metrics) if metrics is not None else {}),
    }


@click.command(params=OPTIONS, context_settings={"help_option_names": ["-h", "--help"]})
def main(recipe: str, overrides: tuple[str, ...], print_config: bool, debug: bool, **options: Any) -> None:
    """Train AlexNet on the ranks that torchrun starts.

    With no options: recipe `demo`, on handwritten digits that are written to data/demo-digits.

    \b
    torchrun --nproc_per_node=2 -m train.main
    torchrun --nproc_per_node=8 -m train.main --recipe tiny-imagenet --data tiny-imagenet-200
    """
    set_up_streams()
    set_up_logging(quiet=env_rank() != 0)

    @record  # torchrun's own report then has the traceback of an unexpected error
    def run() -> str | None:
        try:
            config = make_config(recipe, overrides, options.pop("data"), options.pop("init"))
            if print_config:
                return to_json(config) if env_rank() == 0 else None
            default = " (the default)" if recipe == DEFAULT_RECIPE else ""
            demo = ", the embedded handwritten digits" if config.data.root == str(DEMO_ROOT) else ""
            log.info(f"recipe {config.recipe}{default}, data {config.data.root}{demo}")
            return train(config, **options)
        except Exception as error:
            if isinstance(error, BrokenPipeError) and silence_broken_streams():
                sys.exit(EXIT_BROKEN_PIPE)
            known = line_of(error)
            if debug or known is None:
                raise
            line, code = known
            if env_rank() != 0 and isinstance(error, InterruptedRunError):
                sys.exit(code)
            # A rank that others do not join reports at once: each of them reports another one as lost.
            if env_rank() != 0 and not isinstance(error, RankLostError):
                time.sleep(MAIN_RANK_FIRST_S)
            click.echo(f"error: {visible(line)}", err=True)
            sys.exit(code)

    result = run()
    if result is not None:
        click.echo(result)


if __name__ == "__main__":
    require_utf8()
    main()
