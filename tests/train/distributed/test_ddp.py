"""Gradients over two real ranks, plain and in bfloat16; and the bytes sent, as the kernel counts them."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
import torch

from data_pipeline.common.errors import UserError
from tests.helpers.hybrid_ranks import CLASSES, GLOBAL_BATCH
from tests.helpers.norm_ranks import check_norms
from tests.helpers.warm_ranks import run_ranks
from train.bench.scaling import sent_bytes
from train.config.load import make_config
from train.distributed.ddp import check_norm_batch, describe_parallel, make_parallel, passes_of
from train.distributed.world import World, open_world
from train.models.alexnet import make_model

pytestmark = pytest.mark.usefixtures("thin")

NUM_RANKS = 2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of all ranks, in the order of their numbers."""
    done = run_ranks(NUM_RANKS, ["tests.helpers.ddp_ranks"], cwd=tmp_path_factory.mktemp("ranks"))
    assert done.returncode == 0, done.stderr
    ranks: list[dict[str, Any]] = json.loads(done.stdout)
    assert len(ranks) == NUM_RANKS
    return ranks


@pytest.mark.slow
def test_sent_bytes_are_those_of_the_formulas(found: list[dict[str, Any]]) -> None:
    """The formulas of docs/scaling.md, in which 2 (K - 1)/K is 1 here; 3 kB are for headers."""
    for rank in found:
        ddp, hybrid = rank["ddp"], rank["hybrid"]
        whole = 4 * (ddp["convolutions"] + ddp["fully connected"])
        assert ddp["sent"] == pytest.approx(whole, abs=3000)
        assert rank["bf16"]["sent"] == pytest.approx(whole / 2, abs=3000)
        batch = GLOBAL_BATCH + 1  # both ranks bring as many samples as the one that has more
        activations = batch * ((hybrid["features"] + hybrid["hidden"]) * 4 + 4 * len(CLASSES))
        assert hybrid["sent"] == pytest.approx(4 * hybrid["convolutions"] + activations, abs=3000)


@pytest.mark.slow
def test_bf16_rounds_alike_on_all_ranks(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert 1e-4 < rank["rounding"]["distance"] < 4e-3  # half a unit in the last of 8 bits
        assert rank["rounding"]["equal"]


@pytest.mark.slow
def test_batch_norm_on_2_ranks_has_the_losses_of_one(found: list[dict[str, Any]]) -> None:
    check_norms(found)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.norm_batch=4", "global_batch=12"], r"takes at once \(6\): set it to 3"),
        (["model.norm_batch=4", "global_batch=20"], r"takes at once \(10\): set it to 2"),
        (["model.norm_batch=2", "global_batch=13"], r"\(6, 7\): set global_batch to 16"),
        (
            ["model.norm_batch=4", "global_batch=16", "micro_batch=3"],
            r"\(2, 3\): set global_batch to 16 and micro_batch to 4",
        ),
        (["model.hidden_norm=true", "global_batch=3", "micro_batch=1"], r"micro_batch 1 one has 1: change"),
    ],
)
def test_norm_batches_that_no_share_consists_of_are_refused(overrides: list[str], said: str) -> None:
    config = make_config("demo", ["model.name=bn", *overrides])
    with pytest.raises(UserError, match=said):
        check_norm_batch(config, two_ranks())


@pytest.mark.parametrize(("world_size", "overrides"), [(1, ["micro_batch=1"]), (2, ["global_batch=2"])])
def test_pairs_of_mixed_images_are_not_separated(world_size: int, overrides: list[str]) -> None:
    config = make_config("demo", ["augment.mixup=0.2", *overrides])
    world = World(0, world_size, 0, world_size, torch.device("cpu"))
    with pytest.raises(UserError, match="mix images in pairs, and a rank takes one at a time"):
        passes_of(config, world)
    assert passes_of(make_config("demo", ["augment.mixup=0.2", "global_batch=6"]), world)


@pytest.mark.slow
def test_all_ranks_begin_with_the_weights_that_rank_0_reads(found: list[dict[str, Any]]) -> None:
    """And a step with frozen features changes the rest alike: DDP does not wait for what has no gradient."""
    for rank in found:
        assert rank["begun hybrid"] == {"equal": True, "loaded": 36}
        ddp = rank["begun ddp"]
        assert (ddp["equal"], ddp["loaded"], ddp["alike"]) == (True, 36, 1)
        assert ddp["changed"] == [
            f"classifier.fc{n}.{kind}" for n in (6, 7, 8) for kind in ("bias", "weight")
        ]


def two_ranks() -> World:
    """A place among two ranks that do not exist."""
    with open_world("cpu") as world:
        return World(0, 2, 0, 2, world.device)


def test_description_names_what_travels() -> None:
    config = make_config("demo", ["compress=bf16"])
    assert describe_parallel(config, two_ranks()) == "gradients travel in bfloat16"
    hybrid = make_config("demo", ["parallel=hybrid"])
    assert describe_parallel(hybrid, two_ranks()) == (
        "hybrid: the fully connected layers are split over 2 ranks"
    )


def test_one_rank_compresses_nothing() -> None:
    config = make_config("demo", ["compress=bf16", "model.stem_stride=1", "preprocessing.crop_px=32"])
    with open_world("cpu") as world:
        parallel = make_parallel(make_model(config.model, num_classes=10, crop_px=32), config, world)
        assert parallel._comm_hooks == []
        text = describe_parallel(config, world)
    assert text == "compress=bf16 on one rank: nothing travels, and nothing is split or compressed"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel=hybrid", "compress=bf16"], "compress=bf16 is for plain ddp"),
        (["compress=powersgd"], "compress: Invalid enum value 'powersgd'; it is one of none, bf16"),
        (["powersgd_rank=4"], "unknown key 'powersgd_rank'"),
    ],
)
def test_impossible_settings_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_config("demo", overrides)


def test_sent_bytes_of_open_connections_are_counted() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
        server.accept()[0] as other,
    ):
        before = sent_bytes()
        one.sendall(b"x" * 12_345)
        other.sendall(b"y" * 55)
        received = b""
        while len(received) < 12_345:
            received += other.recv(1 << 16)
        assert sent_bytes() - before == 12_400
