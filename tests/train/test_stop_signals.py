"""Stop signals: all ranks save the same step and exit in time, whichever rank gets which signal."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from scripts.soak.compare import compare_runs
from scripts.soak.launch import is_alive, wait_until
from tests.helpers.ranks import COLD, link_subset, read_rows, torchrun_arguments
from tests.helpers.warm_ranks import ranks_of, train_warm, warm_process
from train.checkpoints.load import find_checkpoint, load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thin")]

BATCH = 25
NUM_STEPS = 24
SETTINGS = (
    *COLD, "model.dropout=0.5", "epochs=2", f"global_batch={BATCH}", "schedule.kind=cosine",
    "log_every=2", "checkpoint_every=5",
)  # fmt: skip
KILL_S = 30
"""After a signal torchrun leaves its ranks so much time, and kills them then."""


@pytest.fixture(scope="module")
def undisturbed(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data, and a run on it that nothing stopped."""
    base = tmp_path_factory.mktemp("undisturbed")
    data = link_subset(demo_data, base / "data", num_train=300, num_val=20)
    run = train_warm(2, data=data, out=base / "runs", overrides=SETTINGS)
    rows = [row["step"] for row in read_rows(run, "train") if row["step"] <= 24]
    assert rows == [2, 4, 5, 6, 8, 10, 12, 14, 15, 16, 18, 20, 22, 24]
    return data, run


def has_rows(folder: Path) -> bool:
    """Return whether training has begun: an earlier signal has nothing to save."""
    return any(path.stat().st_size for path in folder.glob("runs/*/metrics.jsonl"))


def check_saved_and_resume(folder: Path, said: str, undisturbed: tuple[Path, Path]) -> None:
    """Check that the stopped run is saved at the step that it logged, and ends with the same bits."""
    data, whole = undisturbed
    (run,) = (folder / "runs").iterdir()
    (stopped,) = set(re.findall(r"error: stopped by .* at step (\d+), saved; go on with --resume auto", said))
    assert 0 < int(stopped) < NUM_STEPS
    checkpoint = load_checkpoint(find_checkpoint(run, pointer="last"))
    assert (checkpoint.step, checkpoint.samples_seen) == (int(stopped), int(stopped) * BATCH)
    resumed = train_warm(2, data=data, out=run.parent, overrides=SETTINGS, options=["--resume=auto"])
    assert resumed == run
    assert compare_runs(run, whole) == (True, True)


@pytest.mark.parametrize(
    ("number", "rank", "asked"),
    [
        (signal.SIGTERM, 0, "SIGTERM"),
        (signal.SIGUSR1, 1, "another rank's signal"),
        (signal.SIGINT, 1, "another rank's signal"),
    ],
)
def test_signal_to_one_rank_stops_all_with_the_state_saved(
    number: signal.Signals, rank: int, asked: str, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments = ["train.main", f"--data={undisturbed[0]}", "--out=runs", *(f"--set={s}" for s in SETTINGS)]
    with ranks_of(2, arguments, cwd=tmp_path) as ranks:
        assert ranks.wait_until(lambda: has_rows(tmp_path)), ranks.stderr
        ranks.send(number, rank=rank)
        done = ranks.wait(KILL_S)
    assert done.returncode == 75, done.stderr
    assert f"error: stopped by {asked} at step " in done.stderr
    check_saved_and_resume(tmp_path, done.stderr, undisturbed)


def test_ranks_save_without_their_launcher(undisturbed: tuple[Path, Path], tmp_path: Path) -> None:
    """A second signal ends it, and with it the store by which ranks hear of a first one in an evaluation.

    Where they look for what they were told before the signal reaches them, they go on until it does.
    """
    # a step, an evaluation, a step, …
    sets = [f"--set={s}" for s in (*SETTINGS, "global_batch=300", "epochs=1000", "lrn=eager")]
    arguments = ["train.main", f"--data={undisturbed[0]}", "--out=runs", *sets]
    with ranks_of(2, arguments, cwd=tmp_path) as ranks:
        assert ranks.wait_until(lambda: "epoch 1/1000" in ranks.stderr), ranks.stderr
        ranks.store = None
        assert ranks.wait_until(lambda: ranks.stderr.count("the launcher is gone") == 2), ranks.stderr
        for rank in range(2):
            ranks.send(signal.SIGTERM, rank=rank)
        assert ranks.wait(KILL_S).returncode == 75, ranks.stderr
    (stopped,) = re.findall(r"error: stopped by SIGTERM at step (\d+), saved", ranks.stderr)
    (run,) = (tmp_path / "runs").iterdir()
    assert load_checkpoint(find_checkpoint(run, pointer="last")).step == int(stopped)


@pytest.mark.parametrize(
    ("numbers", "to_launcher"),
    [
        # SIGTERM first is a fault of the soak
        pytest.param([signal.SIGINT, signal.SIGTERM, signal.SIGINT], True, id="Ctrl-C, and more"),
        pytest.param([signal.SIGUSR1], False, id="a rank"),
    ],
)
def test_signal_to_torchrun_or_a_rank_stops_all_ranks(
    numbers: list[signal.Signals], to_launcher: bool, undisturbed: tuple[Path, Path], tmp_path: Path
) -> None:
    """A rank that exits makes torchrun restart all: they read in launch.json that the run ended, and exit."""
    arguments = [f"--data={undisturbed[0]}", *(f"--set={s}" for s in SETTINGS)]
    launch = torchrun_arguments(2, [*arguments, "--out=runs"], max_restarts=1)
    with warm_process(launch, cwd=tmp_path) as torchrun:
        assert torchrun.wait_until(lambda: has_rows(tmp_path)), torchrun.stderr
        pid = torchrun.processes[0].pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for number in numbers:
            if to_launcher:
                torchrun.send(number, rank=0)
            else:
                os.kill(int(children[-1]), number)
            time.sleep(0.05)
        assert torchrun.wait(KILL_S).returncode != 0
        # after a second Ctrl-C they end by themselves
        assert wait_until(lambda: not any(is_alive(int(child)) for child in children), KILL_S)
        said = torchrun.stderr
    assert said.count("saved; go on with --resume auto") == (1 if to_launcher else 2)
    if not to_launcher:
        assert re.search(r"exitcode\s*: 75", said)
    check_saved_and_resume(tmp_path, said, undisturbed)
