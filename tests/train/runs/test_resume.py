"""Resuming by hand and after a restart by torchrun, which recovers from ranks that die, hang or fail."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from data_pipeline.common.errors import CorruptFileError, DivergedError, InterruptedRunError, UserError
from data_pipeline.common.files import sha256_of
from scripts.soak.compare import compare_runs
from tests.helpers.ranks import COLD, link_subset, torchrun_arguments
from tests.helpers.warm_ranks import run_ranks, run_warm, train_warm
from train.checkpoints.format import FORMAT, MANIFEST, STATE, Manifest, Pointer, write_manifest
from train.checkpoints.load import find_best
from train.config.load import make_config
from train.distributed.torchrun import Launch, env_launch
from train.runs.folder import create_run
from train.runs.resume import FILE, Start, choose_start, claim_run, end_run, find_resumable

pytestmark = pytest.mark.usefixtures("thin")

BATCH = 30
SETTINGS = (
    *COLD, "model.dropout=0.5", "epochs=2", f"global_batch={BATCH}", "micro_batch=5", "checkpoint_every=2",
    "augment.crop=random_resized",
)  # fmt: skip


@pytest.fixture(scope="module")
def digits(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_subset(demo_data, tmp_path_factory.mktemp("restart") / "data", num_train=120, num_val=10)


@pytest.mark.slow
def test_dead_ranks_are_restarted_and_end_with_the_same_bits(digits: Path, tmp_path: Path) -> None:
    """A step is three forward passes of each rank: deaths before the first checkpoint, and inside a step."""
    faults = [
        {"kind": "error", "rank": 1, "forward": 1, "restart": 0},  # in step 1: nothing is saved yet
        # in step 4, after the checkpoint of step 2, which is written beside training
        {"kind": "kill", "rank": 0, "forward": 10, "restart": 1, "after": "runs/*/checkpoints/step-00000002"},
    ]
    whole = train_warm(2, data=digits, out=tmp_path / "whole", overrides=SETTINGS)
    sets = [f"--data={digits}", *(f"--set={s}" for s in SETTINGS)]
    done = run_warm(torchrun_arguments(2, [*sets, "--out=runs"], faults=faults, max_restarts=3), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert msgspec.json.decode(done.stdout)["step"] == 8
    assert "which has no checkpoint yet" in done.stderr
    starts = [line for line in done.stderr.splitlines() if "resuming at step" in line]
    assert [int(line.split("resuming at step ")[1].split(";")[0]) for line in starts] == [0, 2]
    assert "ArithmeticError: nobody foresaw this" in done.stderr
    assert compare_runs(run, whole) == (True, True)


@pytest.mark.slow
def test_timeout_names_the_hung_rank_and_the_collective(digits: Path, tmp_path: Path) -> None:
    faults = msgspec.json.encode([{"kind": "hang", "rank": 1, "forward": 7}]).decode()
    sets = [f"--data={digits}", "--out=runs", *(f"--set={s}" for s in (*SETTINGS, "timeout_s=4"))]
    done = run_ranks(2, ["tests.helpers.faulty_rank", faults, *sets], cwd=tmp_path)
    assert done.returncode == 1
    assert (
        "error: rank 0 timed out in the sum of gradients of step 3: rank 1 did not join it. "
        "Start again with --resume auto, or let torchrun do so with --max-restarts"
    ) in done.stderr.splitlines()


@pytest.mark.slow
def test_torchruns_report_has_the_traceback_of_unexpected_errors(digits: Path, tmp_path: Path) -> None:
    sets = [f"--data={digits}", "--out=runs", *(f"--set={s}" for s in SETTINGS)]
    arguments = torchrun_arguments(1, sets, faults=[{"kind": "error", "forward": 1}])
    done = run_warm(arguments, cwd=tmp_path)
    assert done.returncode == 1
    report = done.stderr.partition("Root Cause (first observed failure)")[2]
    assert "traceback : Traceback (most recent call last)" in report
    assert "in train_step" in report and "ArithmeticError: nobody foresaw this" in report


def test_launch_resumes_its_own_run_and_no_other_does(tmp_path: Path) -> None:
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
def test_run_that_would_end_alike_is_not_tried_again(
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


def test_launch_is_none_outside_torchrun() -> None:
    assert "TORCHELASTIC_RUN_ID" not in os.environ
    assert env_launch() is None


def write_checkpoint(folder: Path, *, step: int, top1: float, format: int = FORMAT) -> Path:
    """A checkpoint whose state is a few bytes: enough for whatever does not load it."""
    path = folder / f"step-{step:08d}"
    path.mkdir()
    (path / STATE).write_bytes(b"state")
    manifest = Manifest(
        format=format, step=step, epoch=1, sha256=sha256_of(path / STATE), size_bytes=5,
        metrics={"top1": top1}, weights="last",
    )  # fmt: skip
    write_manifest(path, manifest)
    return path


def test_another_configuration_is_refused_with_what_differs(tmp_path: Path) -> None:
    config = make_config("demo")
    assert find_resumable(tmp_path, "auto", config) is None
    assert find_resumable(tmp_path, "none", config) is None
    folder = create_run(tmp_path, config)
    (folder.checkpoints / "last.json").write_text('{"step": 5, "top1": 0.5}')
    with pytest.raises(CorruptFileError, match=r"no checkpoint of .* is whole"):
        find_resumable(tmp_path, "auto", config)
    found = write_checkpoint(folder.checkpoints, step=5, top1=0.5)
    assert find_resumable(tmp_path, "auto", make_config("demo", ["data.threads=3", "log_every=1"])) == found
    with pytest.raises(UserError, match=r"seed was 0, now 1; .*model.name was 'paper', now 'owt'"):
        find_resumable(tmp_path, "auto", make_config("demo", ["seed=1", "model.name=owt"]))
    with pytest.raises(UserError, match="does not exist"):
        find_resumable(tmp_path, str(tmp_path / "nothing"), config)
    (folder.path / "config.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"config.json is damaged"):
        find_resumable(tmp_path, "auto", config)


def test_another_format_is_refused_by_every_way_to_resume(tmp_path: Path) -> None:
    folder = create_run(tmp_path, make_config("demo"))
    checkpoint = write_checkpoint(folder.checkpoints, step=1, top1=0.3, format=2)
    for resume in ("auto", str(folder.path), str(checkpoint)):
        with pytest.raises(UserError, match=r"step-00000001 has format 2; this version reads 1$"):
            find_resumable(tmp_path, resume, make_config("demo"))


def test_damaged_checkpoints_are_logged_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = make_config("demo")
    folder = create_run(tmp_path, config)
    whole = write_checkpoint(folder.checkpoints, step=1, top1=0.3)
    best = write_checkpoint(folder.checkpoints, step=2, top1=0.9)
    flipped = write_checkpoint(folder.checkpoints, step=3, top1=0.95)
    truncated = write_checkpoint(folder.checkpoints, step=4, top1=0.4)
    bare = write_checkpoint(folder.checkpoints, step=5, top1=0.4)
    (folder.checkpoints / "last.json").write_text('{"step": 5, "top1": 0.4}')
    (flipped / STATE).write_bytes(b"stata")
    (truncated / STATE).write_bytes(b"")
    (bare / MANIFEST).unlink()
    assert find_resumable(tmp_path, "auto", config) == best
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    named = [str(bad) in line for bad, line in zip((bare, truncated, flipped), warnings, strict=True)]
    assert named == [True] * 3
    assert find_best(folder.checkpoints, 2) == Pointer(step=2, top1=0.9)
    assert find_best(folder.checkpoints, 1) == Pointer(step=1, top1=0.3)
    assert whole.exists()
