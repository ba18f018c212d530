"""The recipes: each against its source, number by number, and each trained for a step in a small form."""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner

from alexnet import main
from data_pipeline.loading.batches import group_by_step
from data_pipeline.transforms.sampler import steps_per_epoch
from tests.helpers.ranks import link_subset
from train.checkpoints.format import Progress
from train.config.load import decode_config, make_config, recipe_names
from train.config.schema import RunConfig
from train.distributed.world import open_world
from train.loop import evaluate_epoch
from train.optim.schedule import base_lr_for, describe_lr, plateau_drops
from train.runs.changes import rate_at
from train.setup import build_run
from train.step import train_step

pytestmark = pytest.mark.usefixtures("thin")

RECIPES = {
    "demo", "tiny-imagenet", "tiny-imagenet-best",
    "imagenet-paper", "imagenet-caffe", "imagenet-owt", "imagenet-bn-lars", "imagenet-best",
}  # fmt: skip
NUM_IMAGENET = 1_281_167
HISTORIC = ("tiny-imagenet", "imagenet-paper", "imagenet-caffe", "imagenet-owt", "imagenet-bn-lars")
FOLDER = Path(__file__).parents[3] / "train" / "recipes"


def header(name: str) -> str:
    lines = (FOLDER / f"{name}.toml").read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith("#"))


def rates(config: RunConfig, steps: list[int], num_images: int = NUM_IMAGENET) -> list[float]:
    """The rate of some steps, at the recipe's own batch."""
    return [rate_at(step, config, Progress(), num_images) for step in steps]


def test_recipes_are_these() -> None:
    assert set(recipe_names()) == RECIPES
    table = (FOLDER.parent.parent / "docs" / "recipes.md").read_text()
    assert all(f"`{name}`" in table for name in RECIPES)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_header_has_source_and_expected_result(name: str) -> None:
    text = header(name)
    for heading in ("Source:", "Command:", "Data:", "Hardware:", "Result:", "Expected:"):
        assert f"# {heading}" in text, heading
    assert f"--recipe {name} " in text or name == "demo"
    if name not in ("demo", "tiny-imagenet-best"):
        assert "# Result:    not measured yet" in text


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_print_config_prints_what_the_recipe_resolves_to(name: str) -> None:
    done = CliRunner().invoke(main, ["train", "--recipe", name, "--print-config"])
    assert done.exit_code == 0
    config = decode_config(msgspec.json.decode(done.stdout))
    assert config == make_config(name)
    assert config.recipe == name


@pytest.mark.parametrize("name", HISTORIC)
def test_historic_recipes_have_nothing_that_came_later(name: str) -> None:
    config = make_config(name)
    assert (config.label_smoothing, config.ema_decay, config.augment.mixes) == (0, 0, False)
    assert config.optimizer.nesterov is False


def test_tiny_imagenet_recipe_is_the_posts() -> None:
    config = make_config("tiny-imagenet")
    assert (config.epochs, config.global_batch) == (90, 128)
    assert config.schedule.learning_rate == 0.01
    assert (config.optimizer.momentum, config.optimizer.weight_decay) == (0.9, 5e-4)
    assert config.data.root is None


def test_imagenet_paper_recipe_is_the_papers() -> None:
    config = make_config("imagenet-paper")
    optimizer, schedule, augment = config.optimizer, config.schedule, config.augment
    assert (config.epochs, config.global_batch, config.ten_crop) == (90, 128, True)
    assert (config.model.name, config.model.init, config.model.dropout) == ("paper", "paper", 0.5)
    assert (optimizer.momentum, optimizer.momentum_form, optimizer.weight_decay) == (0.9, "paper", 5e-4)
    assert (optimizer.bias_and_norm_rate, optimizer.decay_bias_and_norm) == (1, False)
    assert (augment.crop, augment.flip, augment.pca) == ("random_square", 0.5, 0.1)
    assert (config.preprocessing.resize_px, config.preprocessing.crop_px) == (256, 224)
    assert [255 * s for s in config.preprocessing.std] == pytest.approx([1, 1, 1])
    assert plateau_drops([0.5] * 90, schedule) == 3
    assert schedule.learning_rate * schedule.factor**3 == pytest.approx(1e-5)
    assert "top-1 59.3, top-5 81.8" in header("imagenet-paper")


def test_imagenet_caffe_recipe_is_bvlcs_solver() -> None:
    """base_lr 0.01, gamma 0.1, stepsize 100000, max_iter 450000, momentum 0.9, weight_decay 0.0005."""
    config = make_config("imagenet-caffe")
    optimizer = config.optimizer
    found = rates(config, [0, 99_999, 100_000, 199_999, 200_000, 299_999, 300_000, 399_999, 400_000])
    assert found == pytest.approx([1e-2, 1e-2, *[1e-3] * 2, *[1e-4] * 2, *[1e-5] * 2, 1e-6])
    assert 0 <= 90 * steps_per_epoch(NUM_IMAGENET, config.global_batch) - 450_000 < 400
    assert (config.global_batch, optimizer.momentum, optimizer.weight_decay) == (256, 0.9, 5e-4)
    assert (optimizer.bias_and_norm_rate, optimizer.decay_bias_and_norm) == (2, False)  # lr_mult, decay_mult
    assert (optimizer.momentum_form, config.model.name, config.model.init) == ("paper", "caffe", "caffe")
    assert (config.preprocessing.resize_px, config.preprocessing.crop_px) == (256, 227)
    bgr = [255 * m for m in config.preprocessing.mean][::-1]
    assert bgr == pytest.approx([104.00698793, 116.66876762, 122.67891434], abs=1e-5)
    assert (config.augment.crop, config.augment.flip, config.augment.colors) == ("random", 0.5, False)


def test_imagenet_owt_recipe_is_torchvisions_reference() -> None:
    """--lr 1e-2 beside the defaults: --batch-size 32 on 8 GPUs, --epochs 90, --lr-step-size 30, --wd 1e-4."""
    config = make_config("imagenet-owt")
    optimizer, per_epoch = config.optimizer, NUM_IMAGENET // 256
    found = rates(config, [0, 30 * per_epoch - 1, 30 * per_epoch, 60 * per_epoch - 1, 60 * per_epoch])
    assert found == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4])
    assert (config.epochs, config.global_batch) == (90, 8 * 32)
    assert (optimizer.momentum, optimizer.momentum_form, optimizer.weight_decay) == (0.9, "torch", 1e-4)
    assert optimizer.decay_bias_and_norm and optimizer.bias_and_norm_rate == 1
    assert (config.model.name, config.model.init, config.model.dropout) == ("owt", "torch", 0.5)
    assert (config.augment.crop, config.augment.scale, config.augment.flip) == (
        "random_resized", (0.08, 1.0), 0.5,
    )  # fmt: skip
    assert (config.preprocessing.resize_px, config.preprocessing.crop_px) == (256, 224)


def test_imagenet_bn_lars_recipe_is_its_authors_solver() -> None:
    """base_lr 32, rampup_lr 1 for 10 epochs, poly 2, local_gw_ratio 0.001, momentum 0.9, decay 5e-4."""
    config = make_config("imagenet-bn-lars")
    optimizer, schedule, per_epoch = config.optimizer, config.schedule, NUM_IMAGENET // 32768
    assert rates(config, [0, 10 * per_epoch, 55 * per_epoch]) == pytest.approx([1, 32, 32 / 4])
    assert (config.epochs, config.global_batch, config.micro_batch) == (100, 32768, 1024)
    assert (optimizer.name, optimizer.trust_coefficient) == ("lars", 0.001)
    assert (optimizer.momentum, optimizer.momentum_form, optimizer.weight_decay) == (0.9, "paper", 5e-4)
    assert (config.model.name, config.model.init, config.model.norm_batch) == ("bn", "caffe", 1024)
    for batch, rate in ((8192, 16.0), (131072, 64.0)):
        assert base_lr_for(schedule, batch) == rate
    linear = make_config("imagenet-bn-lars", ["schedule.scaling=linear", "global_batch=8192"]).schedule
    assert base_lr_for(linear, 8192) == 8.0
    assert describe_lr(schedule, 8192) == (
        "learning rate 16 (32 for a batch of 32768, scaled by the square root of the batch), reached from "
        "0.5 in 10 epoch(s), falling to 0 with the power 2"
    )


BEST_NETWORK = {
    "name": "paper", "groups": 1, "norm": "bn_after_relu", "hidden_norm": True, "pool_padding": 1,
}  # fmt: skip


def test_tiny_imagenet_best_recipe_gives_its_reasons() -> None:
    config, text = make_config("tiny-imagenet-best"), header("tiny-imagenet-best")
    model = msgspec.to_builtins(config.model)
    assert model.items() >= {**BEST_NETWORK, "stem_kernel": 5, "stem_stride": 2, "hidden_units": 1024}.items()
    assert (config.epochs, config.global_batch, config.label_smoothing) == (80, 128, 0.1)
    assert (config.augment.crop, config.augment.erase, config.model.dropout) == ("padded", 0.25, 0.5)
    assert config.optimizer.nesterov
    assert rates(config, [390, 781 * 40], 100_000) == pytest.approx([0.1, 0.05], rel=0.02)
    reasons = text.partition("The choices")[2]
    for choice in ("5 x 5", "No groups", "Padded pooling", "behind ReLU", "1,024", "erasing", "Nesterov"):
        assert choice in reasons, choice


def test_imagenet_best_is_cvjenas_with_the_benchmarks_changes() -> None:
    config, text = make_config("imagenet-best"), header("imagenet-best")
    assert msgspec.to_builtins(config.model).items() >= {**BEST_NETWORK, "dropout": 0.0}.items()
    assert (config.epochs, config.global_batch, config.optimizer.weight_decay) == (64, 256, 5e-4)
    per_epoch = NUM_IMAGENET // 256
    assert rates(config, [per_epoch, 64 * per_epoch - 1]) == pytest.approx([0.0496, 1e-5], abs=1e-4)
    assert "60.1/81.9" in text and "cvjena/cnn-models" in text and "caffenet-benchmark" in text


SMALL = (
    "global_batch=8", "micro_batch=4", "preprocessing.resize_px=44", "preprocessing.crop_px=40",
    "model.stem_stride=2", "data.backend=pillow", "cpu_threads=1", "device=cpu", "lrn=eager",
)  # fmt: skip


@pytest.fixture(scope="module")
def digits(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return link_subset(demo_data, tmp_path_factory.mktemp("recipes") / "data", num_train=16, num_val=10)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_trains_and_evaluates_in_a_small_form(
    name: str, digits: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its network, initialisation, augmentation, loss, optimiser, average and evaluation; one step."""
    ghosts = make_config(name).model.norm_batch is not None
    config = make_config(name, [*SMALL, *["model.norm_batch=4"] * ghosts], digits)
    with ExitStack() as stack, caplog.at_level(logging.INFO, "train"):
        world = stack.enter_context(open_world("cpu"))
        run = build_run(config, tmp_path, "none", world, stack)
        network = run.parts.network
        before = {n: p.detach().clone() for n, p in network.named_parameters()}
        batches = run.loader.train(
            run.train_set, config.augment,
            seed=config.seed, global_batch=8, micro_batch=4, num_steps=1,
        )  # fmt: skip
        with closing(batches):
            metrics = train_step(run.parts, next(group_by_step(batches)), 0.01, 0).reduce(world)
        judged = evaluate_epoch(run)
    assert metrics.num_samples == 8 and 1 < metrics.loss < 200
    assert run.parts.guard.read().total == 0
    assert judged.num_samples == 10 and judged.loss == judged.loss
    still = [n for n, p in network.named_parameters() if torch.equal(p, before[n])]
    assert still == []
    assert describe_lr(config.schedule, 8) in caplog.messages
    assert run.parts.ema is None
