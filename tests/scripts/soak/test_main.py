"""The soak, with the real agent of torchrun and ranks that are forked."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from scripts.soak.plan import KINDS
from scripts.soak.report import Report, readable
from tests.helpers.warm_ranks import run_warm

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thin")]


@pytest.mark.timeout(900)
def test_soak_loses_nothing(tmp_path: Path) -> None:
    """The shortest, 80 s: faults of every kind, on two ranks and on a changing number of them."""
    arguments = ["scripts.soak", "--minutes=0.1", "--seed=1", "--json", f"--out={tmp_path / 'soak'}"]
    done = run_warm(arguments, cwd=tmp_path, timeout_s=880)
    assert done.returncode == 0, done.stdout + done.stderr
    report = msgspec.json.decode(done.stdout, type=Report)
    assert "all good" in readable(report)
    fixed, changing = report.rounds
    assert (fixed.state_equal, fixed.rows_equal, fixed.samples_once, fixed.stream_equal) == (True,) * 4
    assert (changing.samples_once, changing.stream_equal) == (True, True)
    assert set(fixed.ranks) == {2} and len(set(changing.ranks)) > 1
    expected = set(KINDS) if os.geteuid() == 0 and not report.not_injected else set(KINDS) - {"fill_disk"}
    assert set(report.injected) == expected
    assert report.survived == report.injected
    assert len(fixed.failed_images) == 1
    assert report.steps_done_again > 0 and report.lost_s > 0
    assert (tmp_path / "soak" / "report.json").is_file()
