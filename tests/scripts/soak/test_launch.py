"""A run under faults: which of its folders counts."""

from __future__ import annotations

from pathlib import Path

from scripts.soak.launch import RunSpec


def test_soak_judges_the_newest_run_folder(tmp_path: Path) -> None:
    spec = RunSpec(seed=0, epochs=1, folder=tmp_path)
    for name in ("demo-20260101T000000Z", "demo-20260101T000009Z"):
        (spec.runs / name).mkdir(parents=True)
    assert spec.run.name == "demo-20260101T000009Z"
