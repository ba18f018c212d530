"""pytest without the extra `dev`, as on a machine with a GPU that only trains: it skips, with reasons."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = (
    "tests/train/optim/test_schedule.py",  # hypothesis
    "tests/infer/ray/test_driver.py",  # Ray
    "tests/infer/predict/test_writers.py",  # pyarrow
    "tests/scripts/deploy/test_trainjob.py",  # PyYAML
    "tests/scripts/soak/test_main.py",  # the marker of pytest-timeout
)


@pytest.mark.slow
def test_missing_developer_packages_are_no_collection_errors() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "tests.helpers.missing_packages", "--collect-only", "-q"]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, *FILES], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("hypothesis", "pyarrow", "yaml"):
        assert f"needs {name}: pip install 'alexnet[dev]'" in done.stdout
    assert "tests/scripts/soak/test_main.py::" in done.stdout and "error" not in done.stdout.lower()
