"""A resumed run's schedule: what is free, what takes a flag and is recorded, and what is refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from data_pipeline.common.errors import UserError
from tests.helpers.ranks import REPOSITORY, TINY, link_subset, read_rows
from tests.helpers.warm_ranks import run_ranks, train_warm
from train.checkpoints.format import STATE, Change, Progress
from train.checkpoints.load import Checkpoint, find_checkpoint, load_checkpoint
from train.checkpoints.safe_load import load_plain
from train.config.load import make_config
from train.config.schema import DECIDE_THE_SCHEDULE, FREE_TO_CHANGE, RunConfig
from train.distributed.torchrun import training_arguments
from train.runs.changes import apply_changes, check_fixed, rate_at

pytestmark = pytest.mark.usefixtures("thin")

NUM_SAMPLES = 100
STEADY = ("schedule.warmup_epochs=0", "schedule.learning_rate=0.8", "global_batch=10", "epochs=4")
"""10 steps an epoch; as a cosine, 0.4 after two epochs of four."""


def config_of(*overrides: str) -> RunConfig:
    return make_config("demo", [*STEADY, *overrides])


def checkpoint_at(step: int, *overrides: str, progress: Progress | None = None) -> Checkpoint:
    config = config_of(*overrides)
    return Checkpoint(
        folder=Path(f"runs/r/checkpoints/step-{step}"), sha256="", step=step, epoch=step // 10,
        samples_seen=step * config.global_batch, config=config, classes=(), metrics={},
        states={"optimizer": {"param_groups": [{"lr": 0.45}]}}, progress=progress or Progress(),
    )  # fmt: skip


def apply(checkpoint: Checkpoint, *overrides: str, allowed: bool = False) -> Progress:
    return apply_changes(config_of(*overrides), checkpoint, NUM_SAMPLES, allowed=allowed)


@pytest.mark.parametrize("kind", ["step", "plateau", "constant"])
def test_more_epochs_are_free_where_no_rate_depends_on_them(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = (f"schedule.kind={kind}", "schedule.milestones=[3.0]")
    with caplog.at_level(logging.INFO, "train"):
        progress = apply(checkpoint_at(40, *schedule), *schedule, "epochs=9")
    assert progress.changes == (Change(step=40, what=("epochs was 4, now 9",)),)
    rate = "0.08" if kind == "step" else "0.8"
    assert caplog.messages == [
        "epochs was 4, now 9, which changes no learning rate: it goes on at a learning rate of "
        f"{rate} (the last step had 0.45)"
    ]


@pytest.mark.parametrize(
    ("overrides", "what", "rate"),
    [
        (["epochs=8"], "epochs was 4, now 8", 0.8 * 0.5 * (1 + 2**-0.5)),
        (["schedule.kind=poly"], "schedule.kind was 'cosine', now 'poly'", 0.8 * 0.5**2),
        (["schedule.learning_rate=0.1"], "schedule.learning_rate was 0.8, now 0.1", 0.05),
        (["global_batch=20"], "global_batch was 10, now 20", 0.4),
        (["epochs=2", "schedule.power=3.0"], "epochs was 4, now 2; schedule.power was 2.0, now 3.0", 0.0),
    ],
)  # fmt: skip
def test_changed_rates_take_the_flag_and_are_recorded(
    overrides: list[str], what: str, rate: float, caplog: pytest.LogCaptureFixture
) -> None:
    before = ("schedule.kind=cosine",)
    goes_on = f"it goes on at a learning rate of {rate:g} (the last step had 0.45)"
    with pytest.raises(UserError) as refused:
        apply(checkpoint_at(20, *before), *before, *overrides)
    assert str(refused.value) == (
        f"cannot resume runs/r as it was: {what}, which changes the learning rates or batches of later "
        f"steps: {goes_on.replace('goes', 'would go')}. Add --allow-changed-schedule to do so, or start a "
        "new run with --resume none"
    )
    assert caplog.messages == []
    earlier = Progress(changes=(Change(step=10, what=("epochs was 3, now 4",)),))
    with caplog.at_level(logging.INFO, "train"):
        progress = apply(checkpoint_at(20, *before, progress=earlier), *before, *overrides, allowed=True)
    assert caplog.messages == [f"{what}, which changes later steps (--allow-changed-schedule): {goes_on}"]
    assert progress.changes == (*earlier.changes, Change(step=20, what=tuple(what.split("; "))))
    assert apply(checkpoint_at(20, *before, progress=progress), *before) is progress


def test_batch_changes_where_an_epoch_starts(caplog: pytest.LogCaptureFixture) -> None:
    """Steps go on to be counted, and the position in the data and in the schedule is that of the epoch."""
    with pytest.raises(UserError, match=r"10, now 20, .* runs/r/checkpoints/step-25 is inside epoch 3; name"):
        apply(checkpoint_at(25), "global_batch=20", allowed=True)
    progress = apply(checkpoint_at(20), "global_batch=20", "schedule.kind=cosine", allowed=True)
    assert (progress.step_offset, progress.samples_offset) == (10, -200)
    wide = config_of("global_batch=20", "schedule.kind=cosine")
    assert rate_at(20, wide, progress, NUM_SAMPLES) == pytest.approx(0.4)
    assert rate_at(30, wide, progress, NUM_SAMPLES) == pytest.approx(0.0, abs=1e-9)
    later = checkpoint_at(25, "global_batch=20", "schedule.kind=cosine", progress=progress)  # of epoch 4
    again = apply(later, "global_batch=5", "schedule.kind=cosine", allowed=True)
    assert 25 - again.step_offset == 3 * 20 and len(again.changes) == 2


def test_fixed_keys_are_refused_and_all_others_are_not() -> None:
    free = ["device=cpu", "data.threads=3", "log_every=3", "checkpoint_every=7", "keep_every=9", "epochs=9"]
    check_fixed(config_of(*free, "schedule.power=3.0"), config_of(), Path("runs/r"))
    with pytest.raises(
        UserError, match=r"cannot resume runs/r .*\(seed was 0, now 1; model.name was 'paper'"
    ):
        check_fixed(config_of("seed=1", "model.name=owt", *free), config_of(), Path("runs/r"))
    with pytest.raises(UserError, match=r"cannot resume runs/r .*\(init_from was 'torchvision', now None\)"):
        check_fixed(config_of(), config_of("init_from=torchvision"), Path("runs/r"))
    with pytest.raises(UserError, match=r"another configuration \(data.balance was 0.0, now 0.5\); use"):
        check_fixed(config_of("data.balance=0.5", *free), config_of(), Path("runs/r"))


def test_table_in_the_documentation_has_every_key() -> None:
    """Each outermost key is in one row, and in the row of its kind."""
    text = (REPOSITORY / "docs/checkpoints.md").read_text().partition("## Resuming")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    found: dict[str, set[str]] = {}
    for keys, answer in rows:
        names = set(re.findall(r"`([a-z_]+)`", keys))
        found.setdefault(answer.split()[0], set()).update(names)
    every, free, scheduled = (
        set(names) for names in (RunConfig.__struct_fields__, FREE_TO_CHANGE, DECIDE_THE_SCHEDULE)
    )
    assert free < every and scheduled < every and not free & scheduled
    assert found["yes"] & every == free | {"epochs"}
    assert found["with"] & every == scheduled
    assert found["no"] == every - free - scheduled


def test_the_ranks_get_the_flag() -> None:
    for allowed in (True, False):
        arguments = training_arguments((), allowed, debug=False, recipe="demo", init="a b", resume="auto")
        assert "--init=a b" in arguments
        assert ("--allow-changed-schedule" in arguments) is allowed


def train(data: Path, out: Path, *overrides: str, options: Sequence[str] = ()) -> Path:
    settings = (*TINY, "global_batch=20", "model.dropout=0.5", "checkpoint_every=2", *overrides)
    return train_warm(1, data=data, out=out, overrides=settings, options=options)


@pytest.fixture(scope="module")
def digits(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_subset(demo_data, tmp_path_factory.mktemp("changes") / "data", num_train=60, num_val=20)


@pytest.mark.slow
def test_run_with_more_epochs_is_the_longer_run(digits: Path, tmp_path: Path) -> None:
    schedule = ("schedule.kind=step", "schedule.milestones=[1.5]", "schedule.warmup_epochs=0.5")
    whole = train(digits, tmp_path / "whole", *schedule, "epochs=3")
    out = tmp_path / "longer"
    longer = train(digits, out, *schedule, "epochs=1")
    assert train(digits, out, *schedule, "epochs=3", options=["--resume=auto"]) == longer
    for split in ("train", "val"):
        ours, theirs = ([(r["step"], r["epoch"], r["lr"], r["loss"]) for r in read_rows(run, split)]
                        for run in (longer, whole))  # fmt: skip
        assert ours == theirs and len(ours) == (9 if split == "train" else 3)
    assert msgspec.json.decode((longer / "config.json").read_bytes())["epochs"] == 3
    ours, theirs = (
        load_plain(find_checkpoint(run, pointer="last") / STATE)["model"] for run in (longer, whole)
    )
    assert all((ours[name] == value).all() for name, value in theirs.items())


@pytest.mark.slow
def test_batch_of_a_run_changes_between_epochs(digits: Path, tmp_path: Path) -> None:
    """Each image is used once an epoch, and the run can be stopped and resumed after the change."""
    out, flag = tmp_path / "runs", "--allow-changed-schedule"
    run = train(digits, out, "epochs=2", "keep_every=1")
    refused = run_ranks(
        1, ["train.main", f"--data={digits}", f"--out={out}", "--resume=auto", "--set=global_batch=10",
            *(f"--set={s}" for s in (*TINY, "model.dropout=0.5", "epochs=4"))], cwd=tmp_path,
    )  # fmt: skip
    assert refused.returncode == 2
    (line,) = [text for text in refused.stderr.splitlines() if text.startswith("error: ")]
    assert "epochs was 2, now 4; global_batch was 20, now 10, which changes" in line and flag in line
    more = ("epochs=4", "global_batch=10", "keep_every=1")
    assert train(digits, out, *more, options=["--resume=auto", flag]) == run
    rows = read_rows(run, "train")
    assert [(row["step"], row["epoch"], row["samples"]) for row in rows] == [
        *((step, 1 + (step - 1) // 3, 20) for step in range(1, 7)),
        *((step, 3 + (step - 7) // 6, 10) for step in range(7, 19)),
    ]
    last = load_checkpoint(find_checkpoint(run, pointer="last"))
    assert (last.step, last.epoch, last.samples_seen) == (18, 4, 240)
    assert [change.step for change in last.progress.changes] == [6]
    resumed = run / "checkpoints" / "step-00000010"
    assert load_checkpoint(resumed).epoch == 2
    assert train(digits, out, *more, options=[f"--resume={resumed}"]) == run  # no flag: nothing changes now
    again = read_rows(run, "train")
    assert [(row["step"], row["loss"], row["lr"]) for row in again] == [
        (row["step"], row["loss"], row["lr"]) for row in rows
    ]
