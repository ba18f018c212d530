"""Opening a run's data: what its first lines say, and ranks that see different images."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.dataset import Contents
from data_pipeline.datasets.open import open_dataset
from data_pipeline.sharding.write import write_shards
from tests.helpers.http_server import serving
from tests.helpers.images import write_folder
from train.config.load import make_config
from train.data import contents_on_ranks, open_data
from train.distributed.world import World


class Ranks:
    """As much of a `World` as opening data needs: one machine, and what other ranks give to a gathering."""

    local_rank = 0

    def __init__(self, *others: dict[str, Contents]) -> None:
        self.others = others
        self.done: list[str] = []

    def gather_objects(self, mine: dict[str, Contents]) -> list[dict[str, Contents]]:
        return [mine, *self.others]

    @contextmanager
    def first_of_machine(self, work: str) -> Iterator[None]:
        self.done.append(work)
        yield

    def wait_for_machines(self, work: str) -> None:
        assert work == self.done[-1], "what is waited for was done"


def test_ranks_that_see_other_images_end_with_one_line(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_folder(tmp_path / split, {"a": 2, "b": 2}, side=16)
    datasets = [open_dataset(tmp_path, split) for split in ("train", "val")]
    same = {dataset.split: dataset.contents() for dataset in datasets}
    assert contents_on_ranks(cast(World, Ranks(same)), datasets) == same
    other = same | {"val": datasets[1].take(np.arange(3)).contents()}
    with pytest.raises(UserError, match="rank 2 sees other images of val than rank 0: give all machines"):
        contents_on_ranks(cast(World, Ranks(same, other)), datasets)


def test_first_lines_say_what_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path / "d" / "train", {"a": 2, "b": 2}, side=16)
    write_folder(tmp_path / "d" / "valid", {"a": 1, "b": 1}, side=16)
    (tmp_path / "d" / "train" / "a" / "x.heic").touch()
    (tmp_path / "d" / "valid" / "x.jpg").touch()
    listed = tmp_path / "mine.jsonl"
    listed.write_text('{"path": "train/a/000.jpg", "reason": "mislabelled"}\n')
    config = make_config("demo", [f"data.quarantine={listed}"], tmp_path / "d")
    with caplog.at_level(logging.INFO, "data_pipeline"):
        train_set, val_set = open_data(config, cast(World, Ranks()))
    assert (len(train_set), len(val_set)) == (3, 2)
    assert caplog.messages == [
        f"train: 1 of 4 images in quarantine left out, by the list {listed}",
        "train: passed over 1 file that is no image (1 .heic)",
        "val: passed over 1 image beside the class folders",
    ]


def test_data_may_be_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both splits come whole into the user's cache; too small a cache for them is said before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, count in (("train", 3), ("val", 2)):
        write_folder(tmp_path / "d" / split, {"a": count, "b": count}, side=16)
    write_shards(tmp_path / "d", tmp_path / "s")
    with serving() as server:
        server.files = {
            f"/{path.relative_to(tmp_path)}": path.read_bytes()
            for path in (tmp_path / "s").rglob("*.*")
            if path.is_file()
        }
        url = Path(f"http://127.0.0.1:{server.server_port}/s")
        tiny = make_config("demo", ["data.remote_cache_gb=0.000001"], url)
        with pytest.raises(UserError, match=r"holds 1e-06 \(data.remote_cache_gb\): set it higher"):
            open_data(tiny, cast(World, Ranks()))
        train_set, val_set = open_data(make_config("demo", [], url), cast(World, Ranks()))
    assert (len(train_set), len(val_set)) == (6, 4)
    assert train_set.root == val_set.root and train_set.root.is_relative_to(tmp_path / "cache")
    assert train_set.contents() == open_dataset(tmp_path / "d", "train").contents()
