"""Compressed gradients on two real ranks; and what each way to share the work sends, as the kernel counts."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest

from data_pipeline.common.errors import UserError
from tests.helpers.compression_ranks import NUM_COMPRESSED
from tests.helpers.hybrid_ranks import CLASSES, GLOBAL_BATCH
from tests.helpers.warm_ranks import run_ranks
from train.bench.traffic import sent_bytes
from train.config.load import make_config
from train.distributed.ddp import compress_gradients, describe_parallel, make_parallel
from train.distributed.world import World, open_world
from train.models.alexnet import make_model
from train.optim.precision import Precision

NUM_RANKS = 2
POWERSGD = ["compress=powersgd", "powersgd_start=500"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the ranks found, in the order of their numbers."""
    done = run_ranks(NUM_RANKS, ["tests.helpers.compression_ranks"], cwd=tmp_path_factory.mktemp("ranks"))
    assert done.returncode == 0, done.stderr
    ranks: list[dict[str, Any]] = json.loads(done.stdout)
    assert len(ranks) == NUM_RANKS
    return ranks


def test_as_many_bytes_are_sent_as_the_formulas_say(found: list[dict[str, Any]]) -> None:
    """The formulas of docs/scaling.md, in which 2 (K - 1)/K is 1 here; half a percent is for headers."""
    for rank in found:
        ddp, hybrid = rank["ddp"], rank["hybrid"]
        whole = 4 * (ddp["convolutions"] + ddp["fully connected"])
        assert ddp["sent"] == pytest.approx(whole, rel=0.005)
        assert rank["bf16"]["sent"] == pytest.approx(whole / 2, rel=0.005)
        assert rank["powersgd"]["sent"] < whole / 50
        batch = GLOBAL_BATCH + 1  # both ranks bring as many samples as the one that has more
        activations = batch * ((hybrid["features"] + hybrid["hidden"]) * 4 + 4 * len(CLASSES))
        assert hybrid["sent"] == pytest.approx(4 * hybrid["convolutions"] + activations, rel=0.005)


def test_bf16_rounds_and_powersgd_remembers_what_it_left_out(found: list[dict[str, Any]]) -> None:
    for rank in found:
        far = rank["distances"]
        assert 1e-4 < far["bf16"] < 4e-3  # half a unit in the last of 8 bits
        assert far["plain steps"] == [0.0, 0.0]
        assert len(far["powersgd"]) == NUM_COMPRESSED and min(far["powersgd"]) > 0.05
        # Of a gradient that stays the same, the mean of what arrives comes nearer with every step.
        means = far["mean of powersgd"]
        assert means == sorted(means, reverse=True) and means[-1] < 0.7 * means[0]
        assert far["alike"]


def test_what_is_not_finite_is_not_remembered(found: list[dict[str, Any]]) -> None:
    """In the first compressed step, which has nothing to go back to, and in a later one."""
    for rank in found:
        for case, first in zip(rank["recovery"], (2, 3), strict=True):
            assert case["kept"]
            assert case["skips"] == {"total": 1, "spikes": 0, "in_row": 0, "first": first}
            assert all(0 < loss < 4 for loss in case["losses"])
        assert rank["recovery"] == found[0]["recovery"]


def test_a_resumed_run_begins_without_errors_and_says_so() -> None:
    config, world = make_config("demo", POWERSGD), two_ranks()
    assert "rank 4 (PowerSGD), from step 501 on" in describe_parallel(config, world, 0)
    assert "errors, which begin anew after 100 whole gradients" in describe_parallel(config, world, 400)
    assert "errors, which begin anew after 2 whole gradients" in describe_parallel(config, world, 900)
    assert describe_parallel(make_config("demo", ["compress=bf16"]), world, 9) == (
        "gradients travel in bfloat16"
    )


def two_ranks() -> World:
    """A place among two ranks that do not exist."""
    with open_world("cpu") as world:
        return World(0, 2, 0, 2, world.device)


def test_on_one_rank_nothing_is_compressed() -> None:
    config = make_config("demo", [*POWERSGD, "model.stem_stride=1", "preprocessing.crop_px=32"])
    with open_world("cpu") as world:
        network = make_model(config.model, num_classes=10, crop_px=32)
        parallel = make_parallel(network, config, world)
        assert compress_gradients(parallel, config, Precision("fp32", "cpu", "asked for"), 0) is None
        said = describe_parallel(config, world, 0)
        with pytest.raises(UserError, match="float16's loss scale changes"):
            compress_gradients(parallel, config, Precision("fp16", "cuda", "asked for"), 0)
    assert said == "compress=powersgd on one rank: nothing travels, and nothing is split or compressed"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel=hybrid", "compress=bf16"], "compress=bf16 is for plain ddp"),
        (["parallel=hybrid", "compress=powersgd"], "compress=powersgd is for plain ddp"),
        (["compress=powersgd", "log_noise_scale=true"], "log_noise_scale compares parts of a gradient"),
        (["powersgd_start=1"], "powersgd_start"),
    ],
)
def test_what_cannot_be_together_is_said(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_config("demo", overrides)


def test_bytes_of_open_connections_are_counted() -> None:
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
