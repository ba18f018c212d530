"""Ranks that die, hang or fail: the run recovers by itself under torchrun, and says who it was."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from data_pipeline.common.errors import DivergedError, InterruptedRunError
from scripts.soak.compare import compare_runs
from tests.helpers.ranks import TINY, link_subset, run_command, torchrun_arguments
from tests.helpers.warm_ranks import run_ranks, train_warm
from train.config.load import make_config
from train.distributed.world import Launch, env_launch
from train.runs.folder import create_run
from train.runs.resume import FILE, Start, choose_start, claim_run, end_run

BATCH = 30
SETTINGS = (
    *TINY, "model.dropout=0.5", "epochs=2", f"global_batch={BATCH}", "micro_batch=5", "checkpoint_every=2",
    "augment.crop=random_resized",
)  # fmt: skip


@pytest.fixture(scope="module")
def digits(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_subset(demo_data, tmp_path_factory.mktemp("restart") / "data", num_train=120, num_val=10)


def test_ranks_that_die_at_any_point_are_restarted_and_the_run_ends_with_the_same_bits(
    digits: Path, tmp_path: Path
) -> None:
    """A step is three forward passes of each rank: deaths before the first checkpoint, and inside a step."""
    faults = [
        {"kind": "error", "rank": 1, "forward": 1, "restart": 0},  # in step 1: nothing is saved yet
        # in step 4, after the checkpoint of step 2, which is written beside training
        {"kind": "kill", "rank": 0, "forward": 10, "restart": 1, "after": "runs/*/checkpoints/step-00000002"},
    ]
    whole = train_warm(2, data=digits, out=tmp_path / "whole", overrides=SETTINGS)
    sets = [f"--data={digits}", *(f"--set={s}" for s in SETTINGS)]
    done = run_command(
        torchrun_arguments(2, [*sets, "--out=runs"], faults=faults, max_restarts=3), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert msgspec.json.decode(done.stdout)["step"] == 8
    assert "which has no checkpoint yet" in done.stderr
    starts = [line for line in done.stderr.splitlines() if "resuming at step" in line]
    assert [int(line.split("resuming at step ")[1].split(";")[0]) for line in starts] == [0, 2]
    assert "ArithmeticError: nobody foresaw this" in done.stderr
    assert compare_runs(run, whole) == (True, True)


def test_a_hung_rank_is_ended_by_the_time_out_which_names_it_and_the_collective(
    digits: Path, tmp_path: Path
) -> None:
    faults = msgspec.json.encode([{"kind": "hang", "rank": 1, "forward": 7}]).decode()
    sets = [f"--data={digits}", "--out=runs", *(f"--set={s}" for s in (*SETTINGS, "timeout_s=4"))]
    done = run_ranks(2, ["tests.helpers.faulty_rank", faults, *sets], cwd=tmp_path)
    assert done.returncode == 1
    assert (
        "error: rank 0 timed out in the sum of gradients of step 3: rank 1 did not join it. "
        "Start again with --resume auto, or let torchrun do so with --max-restarts"
    ) in done.stderr.splitlines()


def test_torchruns_report_has_the_traceback_of_an_error_that_nobody_foresaw(
    digits: Path, tmp_path: Path
) -> None:
    sets = [f"--data={digits}", "--out=runs", *(f"--set={s}" for s in SETTINGS)]
    arguments = torchrun_arguments(1, sets, faults=[{"kind": "error", "forward": 1}])
    done = run_command(arguments, cwd=tmp_path)
    assert done.returncode == 1
    report = done.stderr.partition("Root Cause (first observed failure)")[2]
    assert "traceback : Traceback (most recent call last)" in report
    assert "in train_step" in report and "ArithmeticError: nobody foresaw this" in report


def test_a_launch_goes_on_with_its_own_run_and_no_other_does(tmp_path: Path) -> None:
    config = make_config("demo")
    launch = Launch(run_id="none", launcher="host:1:2", restarts=1)
    assert choose_start(tmp_path, "none", config, launch) == Start(None, None)
    folder = create_run(tmp_path, config)
    claim_run(folder, launch)
    assert choose_start(tmp_path, "none", config, launch) == Start(folder.path, None)
    for other in (
        None,
        Launch(run_id="none", launcher="host:1:3", restarts=1),  # a later process of the same number
        Launch(run_id="job-7", launcher="host:1:3", restarts=1),
    ):
        assert choose_start(tmp_path, "none", config, other) == Start(None, None)

    claim_run(folder, Launch(run_id="job-7", launcher="host:1:2", restarts=0))
    moved = Launch(run_id="job-7", launcher="elsewhere:5:6", restarts=1)
    assert choose_start(tmp_path, "none", config, moved) == Start(folder.path, None)
    fresh = Launch(run_id="job-7", launcher="elsewhere:5:6", restarts=0)  # the same name, used again
    assert choose_start(tmp_path, "none", config, fresh) == Start(None, None)


@pytest.mark.parametrize("kind", [DivergedError, InterruptedRunError])
def test_what_would_only_end_alike_is_not_tried_again(
    kind: type[DivergedError | InterruptedRunError], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, launch = make_config("demo"), Launch(run_id="none", launcher="host:1:2", restarts=1)
    folder = create_run(tmp_path, config)
    end_run(folder, launch, kind("as it was said"))
    with pytest.raises(kind, match="as it was said"):
        choose_start(tmp_path, "none", config, launch)
    (folder.path / FILE).write_bytes(b'{"run_id"')
    assert choose_start(tmp_path, "none", config, launch) == Start(None, None)
    assert "launch.json cannot be read, and is passed over" in caplog.text


def test_outside_torchrun_there_is_no_launch() -> None:
    assert "TORCHELASTIC_RUN_ID" not in os.environ
    assert env_launch() is None
