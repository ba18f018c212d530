"""The trainer's front door: `torchrun --nproc_per_node=2 -m train.main`."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import msgspec
from torch.distributed.elastic.multiprocessing.errors import record

from data_pipeline.common.console import set_up_logging
from data_pipeline.common.errors import (
    CorruptFileError,
    DivergedError,
    InterruptedRunError,
    RankLostError,
    SaveError,
    UserError,
)
from data_pipeline.common.text import visible
from data_pipeline.datasets.demo import DEMO_ROOT
from train.config.load import RunConfig, make_config, to_json
from train.config.options import DEFAULT_RECIPE, OPTIONS
from train.distributed.world import env_launch, env_rank, open_world
from train.health.signals import remember_signals
from train.loop import run_epochs
from train.runs.resume import end_run
from train.setup import build_run

log = logging.getLogger("train")

OURS = (UserError, CorruptFileError, DivergedError, SaveError, InterruptedRunError, RankLostError)
"""What a user is told in one line."""

DEMO_NOTE = ", the embedded handwritten digits"


def train(config: RunConfig, out: Path, resume: str) -> str | None:
    """Train as configured, on the ranks that torchrun started (outside torchrun: one).

    Returns:
        On rank 0, the result as one JSON object: run, step, best top-1, how many images of each split the
        quarantine list left out, skipped steps, how many checkpoints were written and for what share of the
        time training was held up by them, and the last validation metrics.
    Raises:
        UserError, CorruptFileError: each with what is wrong, where, and what to do.
    """
    with ExitStack() as stack:
        interrupt = stack.enter_context(remember_signals())  # the last to go: a second signal finds it, too
        world = stack.enter_context(open_world(config.device, config.timeout_s))
        run_state = build_run(config, out, resume, world, stack, interrupt)
        started = time.monotonic()
        try:
            metrics = run_epochs(run_state)
        except (InterruptedRunError, DivergedError) as error:
            if run_state.folder is not None:
                end_run(run_state.folder, env_launch(), error)
            raise
        seconds = time.monotonic() - started
        if run_state.unsaved is not None:
            raise SaveError(f"the end of the run is not saved: {run_state.unsaved}")
        if run_state.folder is None or run_state.saver is None:
            return None
        result: dict[str, Any] = {
            "run": str(run_state.folder.path),
            "step": run_state.step,
            "best": run_state.saver.best,
        }
        result["num_quarantined"] = {split: c.num_quarantined for split, c in run_state.data.items()}
        result["skipped_steps"] = run_state.skipped
        result["checkpoints"] = {
            "num_saved": run_state.saver.num_saved,
            "held_up_s": run_state.held_up_s,
            "held_up_share": run_state.held_up_s / seconds,
        }
        if metrics is not None:
            result.update(asdict(metrics))
        return msgspec.json.encode(result).decode()


@click.command(params=OPTIONS, context_settings={"help_option_names": ["-h", "--help"]})
def main(
    recipe: str,
    data: Path | None,
    out: Path,
    resume: str,
    overrides: tuple[str, ...],
    print_config: bool,
    debug: bool,
) -> None:
    """Train AlexNet on the ranks that torchrun starts.

    With no options: recipe `demo`, on handwritten digits that are written to data/demo-digits.

    \b
    torchrun --nproc_per_node=2 -m train.main
    torchrun --nproc_per_node=8 -m train.main --recipe tiny-imagenet --data tiny-imagenet-200
    """
    set_up_logging(quiet=env_rank() != 0)

    @record  # torchrun's own report then shows the traceback of an error that nobody foresaw
    def run() -> str | None:
        try:
            config = make_config(recipe, overrides, data)
            if print_config:
                return to_json(config) if env_rank() == 0 else None
            log.info(
                f"recipe {config.recipe}{' (the default)' if recipe == DEFAULT_RECIPE else ''}, "
                f"data {config.data.root}{DEMO_NOTE if config.data.root == str(DEMO_ROOT) else ''}"
            )
            return train(config, out, resume)
        except OURS as error:
            if debug:
                raise
            if env_rank() != 0 and isinstance(error, InterruptedRunError):
                sys.exit(error.exit_code)
            if env_rank() != 0 and not isinstance(error, RankLostError):
                # Most errors meet every rank alike. Rank 0 says it once; torchrun then ends the others.
                time.sleep(5)
            click.echo(f"error: {visible(str(error))}", err=True)
            sys.exit(error.exit_code)

    result = run()
    if result is not None:
        click.echo(result)


if __name__ == "__main__":
    main()
