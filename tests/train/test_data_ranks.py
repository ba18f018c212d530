"""Decoded pixels that ranks share: one rank decodes, losses stay, a killed rank leaves nothing."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cache_ranks import DELAY_S
from tests.helpers.one_size import BAD, NUM_IMAGES, write_images
from tests.helpers.processes import lives, mapped_in_shm, shared_pixels_of, who_maps
from tests.helpers.ranks import TINY, comparable, link_subset, read_rows
from tests.helpers.warm_ranks import ranks_of, run_ranks, train_warm

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thin")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of two ranks of `tests.helpers.cache_ranks`."""
    root = tmp_path_factory.mktemp("data")
    for split in ("train", "val"):
        write_images(root / split)
    done = run_ranks(2, ["tests.helpers.cache_ranks", root], cwd=tmp_path_factory.mktemp("ranks"))
    assert done.returncode == 0, done.stderr
    ranks: list[dict[str, Any]] = json.loads(done.stdout)
    assert len(ranks) == 2
    return ranks


def test_one_process_a_machine_decodes(found: list[dict[str, Any]]) -> None:
    for place in ("ram", "gpu"):
        one, other = (rank[place] for rank in found)
        assert one["decoded"] >= 2 * (NUM_IMAGES - len(BAD)) and other["decoded"] == 0
        assert one["pixels"] == other["pixels"] == found[0]["ram"]["pixels"]
        assert len(one["failed"][0]) == len(BAD) and one["failed"] == other["failed"]
    assert all(rank["none"]["decoded"] == 0 for rank in found)


def test_shared_memory_is_freed_when_it_is_done_with(found: list[dict[str, Any]]) -> None:
    """Where the pixels are on a GPU, that is at once; nobody misses it who is slower."""
    assert [rank["ram"]["mapped"] for rank in found] == [2, 2]
    assert [rank["gpu"]["mapped"] for rank in found] == [0, 0]
    assert [rank[place]["mapped afterwards"] for rank in found for place in ("ram", "gpu")] == [0] * 4


def test_refusal_of_one_machine_is_that_of_every_rank(found: list[dict[str, Any]]) -> None:
    message = "data.cache needs 0.00087 GB of the machine's memory, and 1e-09 GB are free: set it to none"
    assert [rank[case] for rank in found for case in ("refused", "refused elsewhere")] == [message] * 4


def test_one_rank_of_a_machine_works_first(found: list[dict[str, Any]]) -> None:
    (entered, left), (other_entered, _) = (rank["times"] for rank in found)
    assert left - entered >= DELAY_S and other_entered >= left
    assert [rank["failing"] for rank in found] == ["failed", "entered"]


RUN = (
    *TINY, "epochs=2", "global_batch=25", "schedule.warmup_epochs=0", "schedule.learning_rate=0.0004",
    "augment.crop=random_resized", "augment.flip=0.5", "augment.brightness=0.2",
)  # fmt: skip
NUM_STEPS = 4  # in an epoch


@pytest.fixture(scope="module")
def digits(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 digits of 64 pixels, one of which is damaged, and 35 for validation."""
    root = link_subset(demo_data, tmp_path_factory.mktemp("subset") / "data", num_train=100, num_val=35)
    link = sorted((root / "train" / "3").iterdir())[0]
    content = link.read_bytes()
    link.unlink()
    link.write_bytes(content[:300])
    return root


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two epochs on two ranks with and without the cache, and on one with it."""
    base = tmp_path_factory.mktemp("runs")
    return {
        name: train_warm(
            int(name[0]), data=digits, out=base / name / "out", overrides=(*RUN, f"data.cache={name[2:]}")
        )
        for name in ("2 none", "2 ram", "1 ram")
    }


def test_cached_run_has_the_losses_of_the_uncached(runs: dict[str, Path]) -> None:
    for split in ("train", "val"):
        rows = {name: comparable(read_rows(run, split)) for name, run in runs.items()}
        assert rows["2 ram"] == rows["2 none"]
        assert len(rows["1 ram"]) == len(rows["2 ram"]) == (2 * NUM_STEPS if split == "train" else 2)
        losses = [row["loss"] for row in rows["2 ram"]]
        assert [row["loss"] for row in rows["1 ram"]] == pytest.approx(losses, rel=1e-4)
    rows = {name: read_rows(run, "train") for name, run in runs.items()}
    assert [sum(row["failed"] for row in of_run) for of_run in rows.values()] == [2, 2, 2]


def test_resumed_run_may_have_another_cache(runs: dict[str, Path], digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "out" / runs["2 ram"].name
    shutil.copytree(runs["2 ram"], run)
    shutil.rmtree(run / "checkpoints" / f"step-{2 * NUM_STEPS:08d}")
    settings = (*RUN, "data.cache=none")
    again = train_warm(2, data=digits, out=run.parent, overrides=settings, options=["--resume=auto"])
    assert again == run
    expected, rows = (read_rows(one, "train") for one in (runs["2 ram"], run))
    assert (
        rows[:NUM_STEPS] == expected[:NUM_STEPS] and rows[-1] != expected[-1]
    )  # done again, at another time
    assert comparable(rows) == comparable(expected)


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_rank_leaves_no_shared_memory(killed: int, digits: Path, tmp_path: Path) -> None:
    sets = [f"--set={s}" for s in (*RUN, "epochs=200", "data.cache=ram")]
    with ranks_of(2, ["train.main", f"--data={digits}", "--out=out", *sets], cwd=tmp_path) as ranks:
        assert ranks.wait_until(lambda: any(tmp_path.glob("out/*/metrics.jsonl"))), ranks.stderr
        pids = [process.pid or 0 for process in ranks.processes]
        inodes = shared_pixels_of(pids[0])
        assert len(inodes) == 2 and shared_pixels_of(pids[1]) == inodes  # of both splits, one copy
        in_shm = {path for pid in pids for path in mapped_in_shm(pid)}
        ranks.send(signal.SIGKILL, rank=killed)
        ended = ranks.wait()
    assert ended.returncode == -signal.SIGKILL
    end = time.monotonic() + 5
    while who_maps(inodes):
        assert time.monotonic() < end, "a process still has the pixels"
        time.sleep(0.05)
    assert not any(map(lives, pids)) and not [path for path in in_shm if path.exists()]
    # 135 images of 64 x 64, of which one is bad
    kept = "every image is decoded once and kept in shared memory: 0.0017 GB (data.cache)"
    assert [line for line in ended.stderr.splitlines() if "shared memory" in line] == [kept]
    assert "Traceback" not in ended.stderr


def test_killed_decoder_is_one_line_of_another_rank(digits: Path, tmp_path: Path) -> None:
    sets = [f"--set={s}" for s in (*RUN, "data.cache=ram")]
    module = ["tests.helpers.cache_ranks", "killed", f"--data={digits}", "--out=out", *sets]
    with ranks_of(2, module, cwd=tmp_path) as ranks:
        killed, other = ranks.processes
        other.join(30)
        assert (killed.exitcode, other.exitcode) == (-signal.SIGKILL, 1)
        (error,) = (line for line in ranks.stderr.splitlines() if "error" in line.lower())
        assert error.startswith(
            f"error: process {killed.pid}, which decodes the images for all ranks of this"
        )
        assert not any((tmp_path / "out").glob("*"))
