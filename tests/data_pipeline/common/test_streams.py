"""stdout and stderr: UTF-8 for files, what a terminal can show for terminals, and readers that go away."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.streams import EXIT_BROKEN_PIPE
from tests.helpers.ranks import REPOSITORY

NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(REPOSITORY)}
PRINT = """
from data_pipeline.common.streams import binary_stdout, set_up_streams
set_up_streams()
print("Bär", flush=True)
binary_stdout().write("日本".encode())
binary_stdout().flush()
"""


def run(code: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run Python code, all of it ASCII, in a locale that has nothing else."""
    return subprocess.run([sys.executable, "-c", ascii_only(code)], env=os.environ | NO_UTF8, **options)


def ascii_only(code: str) -> str:
    return code.encode("ascii", "backslashreplace").decode()


def test_a_file_gets_utf8_and_a_terminal_what_it_can_show(tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as file:
        assert run(PRINT, stdout=file).returncode == 0
    assert (tmp_path / "out").read_bytes() == "Bär\n日本".encode()
    controller, terminal = pty.openpty()
    assert run(PRINT, stdout=terminal).returncode == 0
    os.close(terminal)
    assert os.read(controller, 1000) == rb"B\xe4r" + b"\r\n" + rb"\u65e5\u672c"
    os.close(controller)


def test_a_program_starts_again_in_utf8_mode_once() -> None:
    done = run(
        "import os, sys; from data_pipeline.common.streams import require_utf8; require_utf8()\n"
        "print(sys.flags.utf8_mode, os.fsencode('日本'), os.environ['PYTHONUTF8'], sys.orig_argv[1:4])",
        capture_output=True,
    )
    assert done.stderr == b""
    assert done.stdout.decode() == f"1 {'日本'.encode()!r} 1 ['-X', 'utf8', '-c']\n"


# A command of ours that prints line by line, and what it prints with.
PRINTS = """
import click, sys, alexnet
from data_pipeline.common.console import make_console
def work():
    printer = {}
    for _ in range(1 << 16):
        printer("x")
alexnet.FrontDoor.get_command = lambda *_: click.Command("work", callback=work)
sys.argv = ["alexnet", "work"]
alexnet.main()
"""


@pytest.mark.parametrize("printer", ["click.echo", "make_console().print"])
def test_a_reader_that_goes_away_ends_a_command_quietly(printer: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PRINTS.format(printer)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"x\n"
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == EXIT_BROKEN_PIPE == 141


def test_a_broken_pipe_elsewhere_is_still_an_error() -> None:
    code = PRINTS.format("[].__class__").replace('printer("x")', "raise BrokenPipeError(32, 'Broken pipe')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: BrokenPipeError: [Errno 32] Broken pipe")
