"""A checkpoint is whole or absent: kills at every point, damaged files, a full disk."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from scripts.soak.compare import compare_runs
from tests.helpers.checkpoint_samples import CONFIG, make_writer, row, small_snapshot
from tests.helpers.ranks import TINY, link_subset, read_rows
from tests.helpers.warm_ranks import ranks_of, run_ranks, train_warm
from train.checkpoints.format import MANIFEST, STATE
from train.checkpoints.load import find_checkpoint
from train.checkpoints.retention import saved_steps
from train.runs.folder import create_run

pytestmark = pytest.mark.usefixtures("thin")

SETTINGS = (
    *TINY, "model.dropout=0.5", "epochs=2", "global_batch=25", "checkpoint_every=1", "keep_checkpoints=6",
)  # fmt: skip


NUM_STEPS = 8


@pytest.fixture(scope="module")
def digits(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_subset(demo_data, tmp_path_factory.mktemp("damage") / "data", num_train=100, num_val=10)


@pytest.fixture(scope="module")
def whole(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that nothing happened to: six checkpoints, and the best."""
    return train_warm(2, data=digits, out=tmp_path_factory.mktemp("whole") / "runs", overrides=SETTINGS)


@pytest.mark.slow
def test_kill_at_any_call_leaves_an_intact_checkpoint(tmp_path: Path) -> None:
    """Of the next step: the old one or the new one. In place of one of the same step: either of the two."""
    done = run_ranks(1, ["tests.helpers.killed_saves"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode(done.stdout)
    for case, before, after in (("next", 1.0, 2.0), ("same", 2.0, 2.5)):
        assert len(found[case]) > 60
        assert set(found[case]) == {before, after}
        assert found[case] == sorted(found[case]), "what was there once was gone after a later kill"


def test_fsync_comes_before_rename_and_rename_before_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut needs this order, and no kill can show it."""
    folder = create_run(tmp_path, CONFIG)
    writer = make_writer(folder)
    writer._write(small_snapshot(1, top1=0.25))
    calls: list[str] = []

    def noted(name: str, path_of: Callable[..., Path]) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> object:
            calls.append(f"{name} {path_of(*arguments).relative_to(folder.path)}")
            return real(*arguments, **more)

        monkeypatch.setattr(os, name, call)

    noted("fsync", lambda number: Path(f"/proc/self/fd/{number}").readlink())
    noted("rename", lambda source, target: target)
    noted("replace", lambda source, target: target)
    noted("rmdir", lambda path, **_: folder.checkpoints / Path(path).name)
    folder.append(row(2))
    writer._write(small_snapshot(2, top1=0.75))
    writing = "checkpoints/.writing-step-00000002"
    assert calls == [
        "fsync metrics.jsonl",
        f"fsync {writing}/state.pt",
        f"fsync {writing}/.manifest.json.writing", f"replace {writing}/manifest.json", f"fsync {writing}",
        f"fsync {writing}", "rename checkpoints/step-00000002", "fsync checkpoints",
        "fsync checkpoints/.best.json.writing", "replace checkpoints/best.json", "fsync checkpoints",
        "fsync checkpoints/.last.json.writing", "replace checkpoints/last.json", "fsync checkpoints",
        "rename checkpoints/.removing-step-00000001", "rmdir checkpoints/.removing-step-00000001",
    ]  # fmt: skip


def flip_bit(folder: Path) -> None:
    content = bytearray((folder / STATE).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / STATE).write_bytes(content)


DAMAGE: dict[int, tuple[Callable[[Path], object], str]] = {
    8: (lambda f: (f / MANIFEST).unlink(), r"step-00000008 has no readable manifest.json: No such file"),
    7: (lambda f: (f / STATE).unlink(), r"step-00000007 has no state.pt: No such file"),
    6: (lambda f: os.truncate(f / STATE, 0), r"step-00000006/state.pt is damaged: it has 0 of \d+ bytes"),
    5: (lambda f: os.truncate(f / STATE, 9999), r"step-00000005/state.pt is damaged: it has 9999 of \d"),
    4: (flip_bit, r"step-00000004/state.pt is damaged: its hash is not the one in its manifest"),
}  # fmt: skip


@pytest.mark.slow
def test_resume_logs_each_damaged_file_and_takes_the_one_before(
    whole: Path, digits: Path, tmp_path: Path
) -> None:
    """Every kind of damage at once, and half a row at the end of `metrics.jsonl`, before a real resume."""
    run = tmp_path / "runs" / whole.name
    shutil.copytree(whole, run)
    for step, (damage, _) in DAMAGE.items():
        damage(run / "checkpoints" / f"step-{step:08d}")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"split":"train","epoch":2,"st')
    arguments = ["train.main", f"--data={digits}", "--out=runs", "--resume=auto"]
    done = run_ranks(2, [*arguments, *(f"--set={s}" for s in SETTINGS)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: checkpoint ")]
    assert len(warnings) == len(DAMAGE)
    for line, (_, said) in zip(warnings, DAMAGE.values(), strict=True):
        assert re.search(said, line), line
        assert line.endswith("; going on from the checkpoint before it")
    assert "5 checkpoint(s) after step 3 are set aside until the next one is written" in done.stderr
    # 4 to 8 in training, 4 and 8 in validation, and the half line
    assert "resuming at step 3; 8 later row(s) of metrics.jsonl dropped" in done.stderr
    assert compare_runs(run, whole) == (True, True)
    assert set(saved_steps(run / "checkpoints")) == set(saved_steps(whole / "checkpoints"))
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")]


@contextmanager
def mounted(folder: Path, size_bytes: int) -> Iterator[None]:
    """A small file system of its own, where that is allowed."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size_bytes}", "test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(["mount", *options], capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root; a limit on file sizes is tested in any case")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk_is_logged_and_the_next_start_resumes(whole: Path, digits: Path, tmp_path: Path) -> None:
    """A file system with room for two checkpoints and a half; then, with more room, the rest of the run."""
    size_bytes = 5 * (find_checkpoint(whole) / STATE).stat().st_size // 2
    sets = [f"--set={s}" for s in SETTINGS]
    arguments = ["train.main", f"--data={digits}", f"--out={tmp_path / 'disk'}", "--resume=auto", *sets]
    with mounted(tmp_path / "disk", size_bytes):
        done = run_ranks(2, arguments, cwd=tmp_path)
        assert done.returncode == 1
        failed = [line for line in done.stderr.splitlines() if "could not be written" in line]
        steps = [
            int(step) for step in re.findall(r"step-(\d+) could not be written: No space left", done.stderr)
        ]
        assert steps[0] == 3 and steps[-1] == NUM_STEPS
        assert all("training goes on" in line or line.startswith("error: ") for line in failed)
        assert "error: the end of the run is not saved: checkpoint " in done.stderr
        assert "Traceback" not in done.stderr
        (run,) = (tmp_path / "disk").iterdir()
        assert list(saved_steps(run / "checkpoints")) == [1, 2]
        assert len(read_rows(run, "val")) == 2, "training did not go on"
        subprocess.run(["mount", "-o", "remount,size=1g", str(tmp_path / "disk")], check=True)
        done = run_ranks(2, arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "resuming at step 2" in done.stderr
        assert compare_runs(run, whole) == (True, True)


@pytest.mark.slow
def test_disk_without_room_does_not_end_training(digits: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: both fail inside `write`."""
    arguments = ["tests.helpers.limited_files", "100000", f"--data={digits}", "--out=runs"]
    done = run_ranks(1, [*arguments, *(f"--set={s}" for s in SETTINGS)], cwd=tmp_path)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert sum("could not be written" in line and "training goes on" in line for line in said) >= 2
    assert said[-1].startswith("error: the end of the run is not saved: checkpoint ")
    assert "Traceback" not in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert len(read_rows(run, "val")) == 2
    assert list((run / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_kills_at_any_time_lose_no_row_and_no_bit(whole: Path, digits: Path, tmp_path: Path) -> None:
    """SIGKILL to both ranks as soon as a row more is there, again and again, until the run is through."""
    arguments = ["train.main", f"--data={digits}", "--out=runs", "--resume=auto"]
    arguments += [f"--set={s}" for s in SETTINGS]
    starts, run = 0, tmp_path / "runs" / "none"
    while True:
        starts += 1
        with ranks_of(2, arguments, cwd=tmp_path) as ranks:
            rows = len(read_rows(run, "train")) if run.exists() else 0

            def more(rows: int = rows) -> bool:
                found = [*(tmp_path / "runs").glob("*/metrics.jsonl")]
                return bool(found) and found[0].read_bytes().count(b"\n") > rows + 2

            if not ranks.wait_until(more):
                assert ranks.wait().returncode == 0, ranks.stderr
                break
            ranks.kill()
        (run,) = (tmp_path / "runs").iterdir()
    assert starts >= 3
    assert compare_runs(run, whole) == (True, True)
