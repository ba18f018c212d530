"""Fully connected layers sharded over ranks compute the numbers of plain DDP.

`tests.train.test_main` has whole runs on 2 and 4 ranks, resumed in either mode. Here 3 ranks, among which
1024 units and 25 samples do not divide, and which have 2, 2 and 3 micro-batches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.common.errors import UserError
from tests.helpers.norm_ranks import check_norms
from tests.helpers.ranks import run_command
from tests.helpers.warm_ranks import run_ranks
from train.config.load import make_config

pytestmark = pytest.mark.usefixtures("thin")

NUM_RANKS = 3


Found = list[dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The results of all ranks, in the order of their numbers."""
    done = run_ranks(NUM_RANKS, ["tests.helpers.hybrid_ranks"], cwd=tmp_path_factory.mktemp("ranks"))
    assert done.returncode == 0, done.stderr
    ranks: Found = json.loads(done.stdout)
    assert len(ranks) == NUM_RANKS
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize(("case", "loss", "numbers"), [("bn", 1e-5, 1e-3), ("owt in bf16", 0.01, 0.25)])
def test_losses_norms_weights_and_momenta_equal_plain_ddps(
    found: Found, case: str, loss: float, numbers: float
) -> None:
    """Dropout is on. In bfloat16 rounding alone is 0.18 of the largest momentum, in float32 1e-6."""
    for rank in found:
        ddp, hybrid = rank[case]["ddp"], rank[case]["hybrid"]
        assert hybrid["losses"] == pytest.approx(ddp["losses"], rel=loss)
        # torch's float32 norm of millions of numbers on a CPU is itself 1e-3 off, of a third of them less
        assert hybrid["norm"] == pytest.approx(ddp["norm"], rel=max(loss, 2e-3))
        assert rank[case]["shapes"], "what is saved is not unsplit"
        assert all(worst < numbers for worst in rank[case]["worst"].values()), rank[case]["worst"]
        assert hybrid["losses"] == found[0][case]["hybrid"]["losses"]


@pytest.mark.slow
def test_hybrid_ranks_hold_their_part_of_the_linear_layers(found: Found) -> None:
    whole, parts = found[0]["bn"]["ddp"]["parameters"], [rank["bn"]["hybrid"]["parameters"] for rank in found]
    everywhere = (sum(parts) - whole) / (NUM_RANKS - 1)
    assert 2e4 < everywhere < 6e4  # convolutions, norms and the last bias
    assert all(held - everywhere == pytest.approx((whole - everywhere) / 3, rel=0.01) for held in parts)


@pytest.mark.slow
def test_hybrid_dropout_masks_are_unique_and_shared_by_ranks(found: Found) -> None:
    for number, rank in enumerate(found):
        masks = rank["masks"]
        assert masks["values"] == [0.0, 2.0]
        assert masks["kept units"] == pytest.approx(0.5, abs=0.01)
        assert masks["kept features"] == pytest.approx(0.5, abs=0.03)
        assert masks["features of the recipe"] and masks["units of the recipe"], number
        assert masks["same again"], "a resumed run would draw other masks"
        # two masks that have nothing to do with each other agree in half their places
        alike = [*masks["same on other slices"], masks["same in next step"], masks["same for next sample"]]
        assert alike == pytest.approx([0.5] * (NUM_RANKS + 1), abs=0.02), number
        assert masks["units gathered as masked"]
        assert masks["features alike on all ranks"] and masks["features gathered as masked"]


@pytest.mark.slow
def test_batch_norm_on_3_ranks_has_the_losses_of_one(found: Found) -> None:
    check_norms(found)


@pytest.mark.slow
def test_hybrid_skips_a_bad_step_on_all_ranks(found: Found) -> None:
    """An overflow in one rank's part of a layer; NaN, infinite losses and gradients on one rank each."""
    for rank in found:
        bad = rank["overflow"]
        assert bad["unchanged"]
        assert (bad["scale"], bad["skips"]) == (512.0, [1, 4])
        assert bad["scale afterwards"] == 64.0
        assert bad["loss afterwards"] == found[0]["overflow"]["loss afterwards"] < 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("compile=true", "compile=true compiles the network as a whole"),
        ("optimizer.name=lars", "lars needs the norm of each whole layer"),
        ("log_noise_scale=true", "log_noise_scale compares each rank's own gradients"),
        ("model.hidden_norm=true", "hidden_norm normalises hidden layers as a whole"),
    ],
)
def test_hybrid_refuses_incompatible_options(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_config("demo", ["model.name=bn", "parallel=hybrid", override])
    assert make_config("demo", ["model.name=bn", override]).parallel == "ddp"


@pytest.mark.slow
@pytest.mark.gpu
def test_hybrid_on_gpus(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs; there is one here")
    done = run_command(
        [
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "-m",
            "tests.helpers.hybrid_ranks",
            "cuda",
        ],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for rank in json.loads(done.stdout):
        assert rank["bn"]["hybrid"]["losses"] == pytest.approx(rank["bn"]["ddp"]["losses"], rel=1e-4)
        assert rank["overflow"]["unchanged"]
