"""Options of `alexnet train` for ranks and machines; tests/scripts/deploy/test_slurm.py runs two."""

from __future__ import annotations

import pytest

from data_pipeline.common.errors import UserError
from train.config.load import make_config
from train.distributed.torchrun import choose_rank_count, rendezvous_options


def test_rendezvous_options_name_one_place_and_run() -> None:
    assert rendezvous_options("1", None, None) == ["--standalone", "--nnodes=1"]
    assert rendezvous_options("2:4", "node1:29400", "job-17") == [
        "--nnodes=2:4", "--rdzv-backend=c10d", "--rdzv-endpoint=node1:29400", "--rdzv-id=job-17",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("num_nodes", "endpoint", "run_id", "message"),
    [
        ("0", None, None, "--nnodes takes a number of machines, or MIN:MAX, not '0'"),
        ("two", "a:1", "x", "--nnodes takes a number of machines, or MIN:MAX, not 'two'"),
        ("1:", "a:1", "x", "not '1:'"),
        ("4:2", "a:1", "x", "--nnodes 4:2: the largest number is below the smallest"),
        ("2", None, "x", "give both, and the same on every machine"),
        ("2", "a:1", None, "give both, and the same on every machine"),
        ("1", "a:1", "none", "give both, and the same on every machine"),  # torchrun's word for no name
        ("1", None, "x", "give both, and the same on every machine"),
    ],
)
def test_rendezvous_that_cannot_meet_is_wrong_use(
    num_nodes: str, endpoint: str | None, run_id: str | None, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        rendezvous_options(num_nodes, endpoint, run_id)
    assert message in str(caught.value)


def test_nproc_takes_a_number_or_auto() -> None:
    config = make_config("demo", ["device=cpu"])
    assert choose_rank_count("auto", config) == 1
    assert choose_rank_count("3", config) == 3
    for wrong in ("0", "-1", "two", "1.5"):
        with pytest.raises(UserError, match="a number above 0, or auto"):
            choose_rank_count(wrong, config)
