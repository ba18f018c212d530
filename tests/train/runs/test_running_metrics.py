"""A run may be stopped at any step: resumed, it ends with the same bits, and no row or sample twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scripts.soak.compare import compare_runs
from tests.helpers.ranks import TINY, link_subset, read_rows
from tests.helpers.warm_ranks import run_ranks
from train.distributed.world import World
from train.health.metrics import AccuracyMeter
from train.runs.running_metrics import RunningMetrics

pytestmark = pytest.mark.usefixtures("thin")

ANYWHERE = (
    *TINY, "log_every=2", "model.name=bn", "model.dropout=0.5", "epochs=2", "global_batch=30",
    "micro_batch=5", "augment.crop=random_resized", "augment.mixup=0.2", "ema_decay=0.5",
    "log_noise_scale=true", "keep_checkpoints=1",
)  # fmt: skip


@pytest.mark.slow
def test_run_stopped_after_every_step_ends_with_the_same_bits(demo_data: Path, tmp_path: Path) -> None:
    """Stopped in the middle of accumulation, of a row, and of evaluation, by one rank or the other."""
    data = link_subset(demo_data, tmp_path / "data", num_train=90, num_val=20)
    sets = [*ANYWHERE, f"data.root={data}"]
    done = run_ranks(2, ["tests.helpers.stopping_ranks", *sets], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # At the end of an epoch twice: its evaluation is broken off, and made by the next start.
    assert json.loads(done.stdout) == [1, 2, 3, 3, 4, 5, 6]
    (whole,), (stopped,) = (list((tmp_path / name).iterdir()) for name in ("whole", "stopped"))
    assert compare_runs(stopped, whole) == (True, True)
    assert [row["step"] for row in read_rows(whole, "train")] == [2, 3, 4, 6]
    for rank in range(2):  # the samples of each step, as the rank wrote them down; none done twice
        streams = [(tmp_path / f"{name}-{rank}.json").read_text() for name in ("whole", "stopped")]
        assert streams[0] == streams[1] and len(json.loads(streams[0])) == 6


def test_row_in_progress_resumes_on_other_numbers_of_ranks() -> None:
    """Two ranks' counts, as a checkpoint has them; nothing is lost or doubled on 2, 1 and 3 ranks."""
    state = {
        "integers": torch.tensor([[5, 1, 2, 0], [7, 3, 4, 1]]),
        "loss_sums": torch.tensor([0.5, 0.25], dtype=torch.float64),
        "noise": None, "num_steps": 2, "skipped": 0, "seconds": 3.0,
    }  # fmt: skip
    for world_size, expected in ((2, [[5, 1, 2, 0], [7, 3, 4, 1]]), (1, [[12, 4, 6, 1]]),
                                 (3, [[12, 4, 6, 1], [0] * 4, [0] * 4])):  # fmt: skip
        rows = []
        for rank in range(world_size):
            row = RunningMetrics(World(rank, world_size, rank, world_size, torch.device("cpu")), None)
            row.load_state_dict(state)
            rows.append(row)
            assert row.num_steps == 2 and 3 <= row.seconds < 60
        assert [row.counts.integers.tolist() for row in rows] == expected
        assert sum(row.counts.loss_sum.item() for row in rows) == 0.75
        rows[0].add(AccuracyMeter(torch.device("cpu")))
        assert rows[0].num_steps == 3
