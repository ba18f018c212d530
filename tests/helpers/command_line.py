"""Calls the command line in this process, and checks its one-line errors."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from alexnet import main


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def assert_one_line(result: Result, code: int, text: str) -> str:
    """One line that begins with `error:`, no traceback, and the exit code. Returns the line."""
    assert result.exit_code == code, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith(("error:", "Error:"))]
    assert len(errors) == 1, result.stderr
    assert text in errors[0]
    assert "Traceback" not in result.output
    return errors[0]
