"""Python environments of their own, for tests of what is installed."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path


def clean_environ() -> dict[str, str]:
    """The environment variables without those that lead Python to this checkout."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def run_pip(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this environment's pip, with the index that the machine is configured with."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    return subprocess.run(command, env=clean_environ(), capture_output=True, text=True, check=False)


def make_environment(folder: Path, *requirements: str, borrow: bool = False) -> Path:
    """Make an environment and install packages into it, without what they depend on.

    Args:
        borrow: whether it also finds the packages of the running environment, behind its own. Editable
            installs are not found.
    Returns:
        Its Python.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    # nothing is compiled that is not imported
    done = run_pip(f"--python={python}", "install", "--no-deps", "--no-compile", *requirements)
    assert done.returncode == 0, done.stderr
    if borrow:
        (packages,) = folder.glob("lib/python*/site-packages")
        (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python
