"""scripts/deploy/train.sbatch with stubs of Slurm: two torchruns meet, stop, are requeued and resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.ranks import COLD, REPOSITORY, link_subset, read_rows
from tests.helpers.warm_python import warm_python

SCRIPT = REPOSITORY / "scripts" / "deploy" / "train.sbatch"

SRUN = f"""#!{sys.executable}
import os, pathlib, signal, subprocess, sys, time
command = sys.argv[1:]
while command[0].startswith("--"):  # srun's own options
    command.pop(0)
with open("calls", "a") as calls:
    print("srun", *command[:8], file=calls)
tasks = [subprocess.Popen(command) for _ in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
if os.environ.get("TIME_IS_UP"):  # what --signal=USR1@300 does when a row has been written
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(pathlib.Path("runs").glob("*/metrics.jsonl")):
        time.sleep(0.02)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
sys.exit(max(task.wait() for task in tasks))  # the highest code of all tasks, as srun has it
"""

SCONTROL = """#!/bin/sh
echo "scontrol $*" >> calls
if [ "$1" = show ]; then echo localhost; echo localhost; fi
"""


def make_stubs(folder: Path, alexnet: str) -> Path:
    """A folder for PATH with Slurm's commands, and `alexnet`."""
    folder.mkdir()
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL), ("alexnet", f"#!/bin/sh\n{alexnet}\n")):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    return folder


def run_job(
    stubs: Path, *arguments: str, num_nodes: int = 1, **more: str
) -> subprocess.CompletedProcess[str]:
    """The script as slurmd runs it, in a job of two machines on this one; `calls` lists what it called."""
    cwd = stubs.parent
    environment = os.environ | {
        "PATH": f"{stubs}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
        "SLURM_SUBMIT_DIR": str(cwd), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": str(num_nodes), **more,
    }  # fmt: skip
    (cwd / "calls").write_text("")
    return subprocess.run(
        ["bash", SCRIPT, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture
def program() -> Iterator[Path]:
    with warm_python() as one:
        yield one


@pytest.mark.slow
def test_slurm_job_out_of_time_saves_requeues_and_resumes(
    demo_data: Path, tmp_path: Path, program: Path
) -> None:
    # 24 steps, of which the signal after the first row leaves most for the second job
    data = link_subset(demo_data, tmp_path / "data", num_train=36, num_val=10)
    stubs = make_stubs(tmp_path / "bin", f'exec {program} -m alexnet "$@"')
    sets = [f"--set={s}" for s in (*COLD, "epochs=8", "global_batch=12")]
    job, port = os.getpid(), 20000 + os.getpid() % 10000

    stopped = run_job(stubs, f"--data={data}", *sets, num_nodes=2, TIME_IS_UP="yes")
    assert stopped.returncode == 0, stopped.stderr
    assert "2 rank(s) on the CPU" in stopped.stderr
    assert "stopped by SIGUSR1 at step" in stopped.stderr
    assert (tmp_path / "calls").read_text().splitlines() == [
        "scontrol show hostnames node[1-2]",
        f"srun alexnet train --nnodes 2 --rdzv-endpoint localhost:{port} --rdzv-id {job}-0",
        f"scontrol requeue {job}",
    ]

    # one machine: a resumed run may have other ranks
    done = run_job(stubs, f"--data={data}", *sets, SLURM_RESTART_COUNT="1")
    assert done.returncode == 0, done.stderr
    assert "requeued 1 time(s) so far" in done.stderr and "resuming at step" in done.stderr
    assert f"--rdzv-id {job}-1" in (tmp_path / "calls").read_text()
    assert "requeue " not in (tmp_path / "calls").read_text()
    assert json.loads(done.stdout)["step"] == 24
    (run,) = (tmp_path / "runs").iterdir()
    assert [row["step"] for row in read_rows(run, "train")] == list(range(1, 25))


@pytest.mark.parametrize(
    ("code", "requeues", "expected", "requeued"),
    [(0, 0, 0, False), (1, 0, 1, False), (2, 3, 2, False), (75, 99, 0, True), (75, 100, 75, False)],
)
def test_slurm_requeues_only_resumable_runs_and_not_forever(
    code: int, requeues: int, expected: int, requeued: bool, tmp_path: Path
) -> None:
    stubs = make_stubs(tmp_path / "bin", f"exit {code}")
    done = run_job(stubs, SLURM_RESTART_COUNT=str(requeues))
    assert done.returncode == expected
    assert ("scontrol requeue" in (tmp_path / "calls").read_text()) == requeued
    assert ("requeued 100 times already" in done.stderr) == (requeues == 100)


def test_slurm_options_are_those_the_trainer_needs() -> None:
    """A torchrun on each machine, a signal in good time before the end, and one log over all requeues."""
    lines = SCRIPT.read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--ntasks-per-node=1", "--signal=USR1@300", "--requeue", "--open-mode=append"} <= set(options)
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    last_option = max(n for n, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert last_option < first_command, "sbatch reads no options behind the first command"
