"""Which checkpoints are kept: the last, the best, every n steps; and one of two during a replacement."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.checkpoint_samples import (
    save_small_network,
)
from train.checkpoints.load import load_checkpoint
from train.checkpoints.retention import REPLACED, prune_checkpoints, restore_replaced, steps_to_keep
from train.config.schema import RunConfig


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        (tmp_path / f"step-{step:08d}").mkdir()
    prune_checkpoints(tmp_path, RunConfig(keep_checkpoints=2), best=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003", "step-00000004"]


def test_kill_while_replacing_a_step_leaves_one_of_both(tmp_path: Path) -> None:
    """The old one steps aside for the new one; a kill in between must not leave the step without any."""
    folder, _ = save_small_network(tmp_path / "checkpoints")
    aside = folder.with_name(f"{REPLACED}{folder.name}")
    folder.rename(aside)
    restore_replaced(folder.parent)
    assert load_checkpoint(folder).step == 3
    folder.rename(aside)
    second, _ = save_small_network(tmp_path / "checkpoints", top1=0.75)
    restore_replaced(folder.parent)
    assert load_checkpoint(second).metrics == {"top1": 0.75}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@given(st.sets(st.integers(1, 300), min_size=1), st.integers(1, 5), st.none() | st.integers(1, 50), st.data())
def test_last_best_and_every_so_many_steps_stay(
    steps: set[int], keep_last: int, keep_every: int | None, data: st.DataObject
) -> None:
    best = data.draw(st.none() | st.sampled_from(sorted(steps)))
    kept = steps_to_keep(steps, keep_last=keep_last, keep_every=keep_every, best=best)
    assert set(sorted(steps)[-keep_last:]) <= kept <= steps
    assert best is None or best in kept
    for multiple in range(keep_every or 400, 301, keep_every or 1):
        first = min((step for step in steps if step >= multiple), default=None)
        assert first is None or first in kept or first >= multiple + (keep_every or 0)
