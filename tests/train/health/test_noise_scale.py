"""The gradient noise scale against known answers, and as logged by two ranks against one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipeline.common.errors import UserError
from data_pipeline.loading.batches import Batch
from tests.helpers.ranks import TINY, link_subset, read_rows
from tests.helpers.step_samples import parts_of
from tests.helpers.warm_ranks import train_warm
from train.config.load import make_config
from train.distributed.world import World, open_world
from train.health.noise_scale import NoiseEstimate, NoiseMeter, estimate_noise, smooth_noise
from train.inputs.pass_inputs import to_device
from train.main import train
from train.runs.folder import MetricsRow
from train.runs.metrics_log import NoiseAverages
from train.step import StepParts, train_step

pytestmark = pytest.mark.usefixtures("thin")

NOISY = (
    *TINY, "epochs=1", "log_noise_scale=true", "schedule.kind=constant", "schedule.warmup_epochs=0",
    "schedule.learning_rate=0.0002",
)  # fmt: skip
BATCH = 24


@pytest.fixture(scope="module")
def digits(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_subset(demo_data, tmp_path_factory.mktemp("noise") / "data", num_train=4 * BATCH, num_val=10)


@pytest.fixture
def world() -> Iterator[World]:
    with open_world("cpu") as one:
        yield one


class Quadratic(nn.Module):
    """Loss of a sample x: sum a (w - x)² / 2, so that its gradient is a (w - x)."""

    def __init__(self, curvature: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full_like(curvature, 0.5))
        self.curvature = curvature

    def forward(self, samples_ND: Tensor) -> Tensor:
        losses_N: Tensor = (self.curvature * (self.weight - samples_ND) ** 2).sum(1) / 2
        return losses_N


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(16, 16), (4, 4, 4, 4, 4, 4, 4, 4), (2, 7, 23)])
def test_noise_scale_of_a_quadratic_is_the_known_one(world: World, sizes: tuple[int, ...]) -> None:
    """|G|² within 5% and tr(S) within 2% (about three standard errors of each).

    200 batches of 32 with 400 weights have the errors of 2000 batches with 40: each weight counts alone.
    """
    generator = torch.Generator().manual_seed(0)
    curvature = torch.linspace(0.2, 2.0, 400)
    network = Quadratic(curvature)
    meter, batch = NoiseMeter(network, world, 32), sum(sizes)
    for _ in range(200):
        network.zero_grad()
        for size in sizes:
            meter.start_part()
            losses_N = network(torch.randn(size, 400, generator=generator))
            torch.autograd.backward(losses_N.sum() / 32)
            meter.end_part(torch.ones(size, dtype=torch.bool))
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        meter.end_step(gradients, torch.ones(()), torch.zeros(()))
    found = meter.read()
    square, trace = (0.5 * curvature).square().sum().item(), curvature.square().sum().item()
    assert found is not None and found.num_steps == 200 and batch == 32
    assert found.trace == pytest.approx(trace, rel=0.02)
    assert found.square == pytest.approx(square, rel=0.05)
    assert found.scale == pytest.approx(4.0, rel=0.06)


def test_noise_scale_without_parts_or_signal_is_none() -> None:
    assert estimate_noise([], 8) is None
    lost = estimate_noise([(30.0, 2, 4, 1.0)], 4)
    assert lost == NoiseEstimate(square=-5.5, trace=26.0, num_steps=1) and lost.scale is None


def noise_batches(sizes: Sequence[int]) -> list[Batch]:
    """Images of noise, on which no windows of max pooling tie: there rounding decides where gradients go."""
    random, batches = np.random.default_rng(0), []
    for number, size in enumerate(sizes, start=1):
        images = random.integers(0, 256, (size, 22, 22, 3), dtype=np.uint8)
        labels, places = random.integers(0, 10, size), np.arange(size)
        last = number == len(sizes)
        batches.append(Batch(images, labels, np.ones(size, bool), places, places, (), (), step=0, last=last))
    return batches


def gradients_of_samples(parts: StepParts, batch: Batch) -> Iterator[Tensor]:
    """One flat gradient for each sample of a batch, each from a pass of its own."""
    images_NHWC, labels_N, _ = to_device(batch, parts.world.device)
    parameters = list(parts.network.parameters())
    for image_HWC, label in zip(images_NHWC, labels_N, strict=True):
        logits_NC = parts.network(parts.normalize(image_HWC[None]))
        loss = nn.functional.cross_entropy(logits_NC, label[None])
        yield torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()


@pytest.mark.slow
def test_train_step_against_gradients_sample_by_sample(world: World) -> None:
    """Three micro-batches, one with an unreadable file, against the definition, to 1e-4."""
    config = make_config("demo", [*NOISY, "global_batch=12", "micro_batch=5"])
    batches = noise_batches([5, 5, 2])
    batches[1].valid[4] = False
    parts = parts_of(config, world)
    sums, whole, count = 0.0, torch.zeros(()), 0
    for batch in batches:
        gradients = list(gradients_of_samples(parts, batch))
        kept = [g for g, valid in zip(gradients, batch.valid, strict=True) if valid]
        part = torch.stack(kept).sum(0)
        sums += part.square().sum().item() / len(kept)
        whole, count = whole + part, count + len(kept)
    trace = (sums - whole.square().sum().item() / count) / (len(batches) - 1)
    square = (whole.square().sum().item() / count - trace) / count
    train_step(parts, batches, 1e-4, 0)
    assert parts.noise is not None
    found = parts.noise.read()
    assert found is not None and count == 11
    assert found.trace == pytest.approx(trace, rel=1e-4)
    assert found.square == pytest.approx(square, rel=1e-4)


@pytest.mark.slow
def test_noise_scale_of_two_ranks_matches_one_with_two_parts(digits: Path, tmp_path: Path) -> None:
    sets = [*NOISY, f"global_batch={BATCH}"]
    runs = [train_warm(2, data=digits, out=tmp_path / "two", overrides=sets)]
    assert train(make_config("demo", [*sets, "micro_batch=12"], digits), tmp_path / "one", "none") is not None
    runs += (tmp_path / "one").iterdir()
    two, one = (read_rows(run, "train") for run in runs)
    assert len(one) == len(two) == 4
    for key in ("grad_square", "grad_trace", "noise_scale"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-3), key
    assert all(row["grad_trace"] > 0 for row in one)
    assert "grad_trace" not in read_rows(runs[0], "val")[0]
    # A resumed run has the rows alone, and goes on with the sums that they add up to.
    rows = [MetricsRow(**row) for row in one]
    resumed = NoiseAverages(rows[:3])
    last = NoiseEstimate(square=one[3]["grad_square"], trace=one[3]["grad_trace"], num_steps=1)
    assert resumed.fields(last) == {key: one[3][key] for key in ("grad_square", "grad_trace", "noise_scale")}
    assert resumed.fields(None)["noise_scale"] is None
    assert smooth_noise(None, last).scale != one[3]["noise_scale"]


def test_noise_scale_refuses_a_batch_of_one_part(digits: Path, tmp_path: Path) -> None:
    config = make_config("demo", [*NOISY, f"global_batch={BATCH}"], digits)
    with pytest.raises(UserError, match="a batch is one part: use more ranks, or --set micro_batch=12"):
        train(config, tmp_path, "none")
    assert list(tmp_path.iterdir()) == []
