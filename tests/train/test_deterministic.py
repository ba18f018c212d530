"""`deterministic = true`: the same bits twice, and after a resume; on a CPU those of a run without it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from data_pipeline.loading.batches import Batch
from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.mix import mix_params_at
from data_pipeline.transforms.trivial import trivial_params_at
from scripts.soak.compare import compare_runs
from tests.helpers.plain_kernels import PLAIN
from tests.helpers.ranks import TINY, link_subset, read_rows
from tests.helpers.recorder import run_every_time
from tests.helpers.step_samples import small_batch, small_trainer
from tests.helpers.warm_ranks import run_ranks, train_warm
from train.distributed.world import open_world
from train.graphs.capture import Capture, CudaCapture
from train.graphs.fused_forward import make_fused_step
from train.graphs.verdict import read_record
from train.kernels.interface import triton_kernels
from train.step import train_step

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("thin")]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NETWORKS = (
    ("model.name=paper",),
    ("model.name=caffe", "optimizer.name=lars"),
    ("model.name=owt", "preprocessing.crop_px=72", "preprocessing.resize_px=72"),  # averages a map of 7 x 7
    ("model.name=bn", "model.norm_batch=2"),
    ("model.groups=1", "model.norm=bn_after_relu", "model.hidden_norm=true", "model.pool_padding=1"),
)
RATE = 1e-3


def batch_of(crop_px: int) -> Batch:
    """Four images of noise, with all that a step does to images."""
    places, augment = np.arange(4), Augment(mixup=0.8, trivial=True)
    images = np.random.default_rng(0).integers(0, 256, (4, crop_px, crop_px, 3), dtype=np.uint8)
    batch = small_batch(
        trivial=trivial_params_at(0, 0, places, augment),
        mix=mix_params_at(0, 0, places, augment, crop_px),
        erase=np.array([[3, 4, 9, 12]] * 4),
    )
    return replace(batch, images=images)


def bits_of(
    device: Literal["cpu", "cuda"], overrides: tuple[str, ...], *, deterministic: bool, num_steps: int = 3
) -> list[bytes]:
    """Of the weights, momenta and average after some steps."""
    with open_world(device, deterministic=deterministic) as world:
        parts = small_trainer(world, "model.hidden_units=64", "ema_decay=0.9", *overrides)
        for step in range(num_steps):
            train_step(parts, [batch_of(parts.config.preprocessing.crop_px)], RATE, step)
        assert parts.ema is not None and parts.guard.read().total == 0
        momenta = [state["momentum_buffer"] for state in parts.optimizer.state.values()]
        tensors = [*parts.network.state_dict().values(), *momenta, *parts.ema.values.values()]
        return [tensor.cpu().numpy().tobytes() for tensor in tensors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overrides", NETWORKS)
def test_steps_of_every_network_repeat_their_bits(
    device: Literal["cpu", "cuda"], overrides: tuple[str, ...]
) -> None:
    first, second = (bits_of(device, overrides, deterministic=True) for _ in range(2))
    assert first == second
    assert first != bits_of(device, overrides, deterministic=True, num_steps=2)
    if device == "cpu":
        assert first == bits_of(device, overrides, deterministic=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["paper", "bn"])
def test_fused_steps_repeat_their_bits(device: Literal["cpu", "cuda"], name: str) -> None:
    """Six steps: on a GPU three are recorded and three replayed."""
    ends = []
    for _ in range(2):
        with open_world(device, deterministic=True) as world:
            parts = small_trainer(world, "model.hidden_units=64", f"model.name={name}")
            on_gpu = device == "cuda"
            capture: Capture = CudaCapture(world.device) if on_gpu else run_every_time
            fast = make_fused_step(parts, capture, triton_kernels() if on_gpu else PLAIN)
            for step in range(6):
                fast([batch_of(32)], RATE, step)
            assert parts.guard.read().total == 0
            ends.append([value.cpu().numpy().tobytes() for value in parts.network.state_dict().values()])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("device", DEVICES)
def test_runs_and_a_resumed_one_end_with_the_same_bits(device: str, demo_data: Path, tmp_path: Path) -> None:
    data = link_subset(demo_data, tmp_path / "data", num_train=60, num_val=20)
    settings = (
        *TINY, f"device={device}", "deterministic=true", "model.dropout=0.5", "augment.mixup=0.2",
        "augment.crop=random_resized", "global_batch=20", "epochs=2", "checkpoint_every=1", "keep_every=1",
    )  # fmt: skip
    first, second = (
        train_warm(1, data=data, out=tmp_path / name, overrides=settings) for name in ("first", "second")
    )
    assert compare_runs(first, second) == (True, True)
    assert [row["step"] for row in read_rows(first, "train")] == [1, 2, 3, 4, 5, 6]
    record = read_record(first / "step.json")
    assert record is not None and record.chosen == "plain" and record.task["deterministic"] == "true"
    stopped = second / "checkpoints" / "step-00000002"  # as if it had been killed after this step
    options = [f"--resume={stopped}"]
    assert train_warm(1, data=data, out=tmp_path / "second", overrides=settings, options=options) == second
    assert compare_runs(first, second) == (True, True)
    shutil.rmtree(second)
    sets = [f"--set={s}" for s in (*settings, "deterministic=false")]
    refused = run_ranks(
        1, ["train.main", f"--data={data}", "--out=first", "--resume=auto", *sets], cwd=tmp_path
    )
    assert refused.returncode == 2
    assert "deterministic was True, now False" in refused.stderr
