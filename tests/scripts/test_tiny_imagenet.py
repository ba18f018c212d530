"""The script that shows everything about Tiny ImageNet: its steps and their bounds."""

from __future__ import annotations

import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "tiny_imagenet.sh"


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)


def test_steps_are_bounded_to_twenty_minutes() -> None:
    done = run_script("--list")
    steps = {name: int(seconds) for name, seconds, _ in map(str.split, done.stdout.splitlines())}
    assert list(steps) == ["post", "best", "ten-crop", "export", "int8", "gate", "speed", "speedrun"]
    assert sum(steps.values()) <= 20 * 60 and steps["best"] == 6 * 60


def test_wrong_use_names_the_steps() -> None:
    done = run_script("--only", "training")
    assert done.returncode == 2
    assert done.stderr == (
        "error: no step training; the steps are post best ten-crop export int8 gate speed speedrun\n"
    )
    assert run_script("--only").returncode == run_script("--fast").returncode == 2
