"""The front door: the command line, and what Python code imports.

    from alexnet import Predictor, find_inputs, load_bundle

Both are lazy. A command's module imports only click and does its work inside the command's body, so `--help`
starts at once; a name of the Python interface is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from infer.bundle.load import load_bundle as load_bundle
    from infer.predict.inputs import find_inputs as find_inputs
    from infer.predictor import Predictor as Predictor

COMMANDS = {
    "bench": "infer.bench.cli:bench",
    "checkpoint": "train.cli:checkpoint",
    "data": "data_pipeline.cli:data",
    "doctor": "infer.commands.doctor:doctor",
    "evaluate": "infer.commands.evaluate:evaluate",
    "export": "infer.commands.export:export",
    "predict": "infer.commands.predict:predict",
    "search": "infer.commands.search:search",
    "report": "infer.commands.report:report",
    "train": "train.cli:train",
}
"""Where each command or group of commands is declared: `module:attribute`."""

INTERFACE = {
    "Predictor": "infer.predictor:Predictor",
    "find_inputs": "infer.predict.inputs:find_inputs",
    "load_bundle": "infer.bundle.load:load_bundle",
}
"""Where each name of the Python interface is defined: `module:attribute`."""

EXIT_WRONG_USE = 2
EXIT_STOPPED = 130
"""After Ctrl-C, as a shell says it."""

TRAINING_PACKAGES = {"torch", "torchvision", "onnx", "onnxscript", "tensorboard", "sklearn"}
"""Packages that a machine which only serves does not have."""


def __getattr__(name: str) -> Any:
    if name not in INTERFACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _import(INTERFACE[name], "data_pipeline", "infer")  # a script may have a train.py of its own


def _import(place: str, *packages: str) -> Any:
    """The object at a `module:attribute`, of our packages and not of others that Python finds first."""
    _import_own(*packages)
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _import_own(*packages: str) -> None:
    """Import packages of ours, whatever lies where Python looks first."""
    start = Path(__file__).parent / "data_pipeline/common/start.py"
    runpy.run_path(str(start))["import_own"](*packages)


class FrontDoor(click.Group):
    """Imports a command when it is named.

    A failure is one line on stderr and an exit code; a traceback comes only with `--debug`.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, sorted."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """One command or group; None for a name that is none."""
        if cmd_name not in COMMANDS:
            return None
        command = _import(COMMANDS[cmd_name], "data_pipeline", "infer", "train")
        assert isinstance(command, click.Command)
        return command

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line; that of this process in an encoding in which every name can be written."""
        _import_own("data_pipeline")
        if not args and options.get("args") is None:
            from data_pipeline.common.streams import require_utf8

            require_utf8()
        return super().main(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and turn an exception into its line and code."""
        from data_pipeline.common.streams import EXIT_BROKEN_PIPE, silence_broken_streams

        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt as error:
            click.echo("error: stopped", err=True)
            raise click.exceptions.Exit(EXIT_STOPPED) from error
        except Exception as error:
            if isinstance(error, BrokenPipeError) and silence_broken_streams():
                raise click.exceptions.Exit(EXIT_BROKEN_PIPE) from None
            if ctx.params.get("debug"):
                raise
            from data_pipeline.common.errors import line_of
            from data_pipeline.common.text import visible

            known = line_of(error)
            if isinstance(error, ModuleNotFoundError) and error.name in TRAINING_PACKAGES:
                known = f"{error.name} is not installed: pip install 'alexnet[train]'", EXIT_WRONG_USE
            if known is None:
                what = (str(error).splitlines() or [""])[0]
                known = f"{type(error).__name__}: {what} (traceback: alexnet --debug …)", 1
            line, code = known
            click.echo(f"error: {visible(line)}", err=True)
            raise click.exceptions.Exit(code) from error


@click.group(cls=FrontDoor, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="alexnet", prog_name="alexnet")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """AlexNet: train on many GPUs, export to ONNX and TensorRT, predict.

    \b
    Exit codes: 0 all good; 1 failure; 2 wrong use; 3 finished, but some inputs could not
    be read; 4 an exported model does not agree with its checkpoint; 75 training was asked
    to stop and has saved its state; 130 stopped by Ctrl-C.
    """
    from data_pipeline.common.console import set_up_logging
    from data_pipeline.common.streams import set_up_streams

    set_up_streams()
    set_up_logging()


if __name__ == "__main__":
    sys.exit(main())
