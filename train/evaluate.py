"""Evaluation over a split: the loop that validation during training shares with `alexnet evaluate`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from data_pipeline.common.errors import SaveError, UserError
from data_pipeline.common.passed_over import log_passed_over
from data_pipeline.common.text import printable
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset, open_recorded
from data_pipeline.decode.backend import make_backend
from data_pipeline.loader import Loader
from data_pipeline.loading.batches import Batch
from data_pipeline.remote.shards import local_root
from data_pipeline.results.class_report import ClassCounts, ClassReport, write_csv
from train.checkpoints.load import Checkpoint
from train.config.schema import Device
from train.distributed.world import World, cpu_share, open_world
from train.health.metrics import AccuracyMeter, ClassMeter, Metrics
from train.inputs.mixup import average_views
from train.inputs.packed import tensor_to_device
from train.inputs.pass_inputs import to_device
from train.models.alexnet import AlexNet, Normalize
from train.optim.precision import Precision, choose_precision

log = logging.getLogger("train")

# Shapes: N samples of one batch, H and W rows and columns, C classes, K of them.

EVAL_BATCH = 256
"""Most images that one rank evaluates at once; with ten crops each image is ten."""


class EvaluationStoppedError(Exception):
    """An evaluation that ended early because `stop` asked for it."""


def eval_micro_batch(ten_crop: bool) -> int:
    """Return how many samples of a split to evaluate at once."""
    return EVAL_BATCH // 10 if ten_crop else EVAL_BATCH


@torch.inference_mode()
def evaluate(
    network: AlexNet,
    normalize: Normalize,
    batches: Iterable[Batch],
    precision: Precision,
    world: World,
    *,
    num_samples: int,
    stop: Callable[[], bool] | None = None,
    classes: ClassMeter | None = None,
) -> Metrics:
    """Compute loss, top-1 and top-5 over a split, every sample counted once on any number of ranks.

    Args:
        batches: this rank's share of the split; where they hold several views, their softmax is averaged.
        num_samples: size of the split, which the counts of all ranks must add up to.
        stop: called before each batch; True ends the evaluation. The ranks need not agree.
        classes: counts each pair of classes as well; this rank's share, which the caller reduces.
    Returns:
        Metrics of the whole split, the same on every rank.
    Raises:
        EvaluationStoppedError: `stop` was True on any rank; raised on every rank.
    """
    network.eval()
    meter, stopped = AccuracyMeter(world.device), False
    for batch in batches:
        if stop is not None and stop():
            stopped = True
            break
        images_NHWC, labels_N, valid_N = to_device(batch, world.device)
        views = images_NHWC.shape[1:-3]
        with precision.autocast():
            # `forward` bypasses a compiled call, which would recompile for every batch size.
            logits_NC = network.forward(normalize(images_NHWC.flatten(0, len(views)))).float()
        if views:
            logits_NC = average_views(logits_NC, views[0])
        losses_N = cross_entropy(logits_NC, labels_N, reduction="none")
        ranked_NK = meter.add(logits_NC, losses_N, labels_N, valid_N)
        if classes is not None:
            indices_N = tensor_to_device(batch.indices, world.device)
            classes.add(logits_NC, ranked_NK, labels_N, valid_N, indices_N)
    if stop is not None and world.any(stopped):
        raise EvaluationStoppedError("the evaluation was broken off")
    metrics = meter.reduce(world)
    counted = metrics.num_samples + metrics.num_failed
    assert counted == num_samples, f"counted {counted} of {num_samples} samples"
    return metrics


def load_split(checkpoint: Checkpoint, data: Path | None, split: str, option: str = "--data") -> Dataset:
    """Open the images to evaluate a checkpoint on: those of `data`, or of the folder it was trained on.

    Args:
        option: how `data` is named on the command line, for messages.
    Raises:
        UserError: no such folder, or other classes than the checkpoint's.
    """
    trained_on = checkpoint.config.data
    if (place := data or trained_on.root) is None:
        raise UserError(f"{checkpoint.folder} does not say what it was trained on: name it with {option} DIR")
    root = local_root(place, [split], cache_gb=trained_on.remote_cache_gb)
    dataset = open_recorded(root, split, option) if data is None else open_dataset(root, split)
    log_passed_over(dataset.split, dataset.passed_over)
    if dataset.classes != checkpoint.classes:
        raise UserError(
            f"{printable(dataset.root)}/{split} has other classes than {checkpoint.folder} was trained on "
            f"({len(dataset.classes)} and {len(checkpoint.classes)}): name its data with {option} DIR"
        )
    return dataset


def evaluate_checkpoint(
    checkpoint: Checkpoint, dataset: Dataset, *, device: Device = "auto", ten_crop: bool = False
) -> tuple[Metrics, ClassCounts, ClassReport]:
    """Compute loss, top-1 and top-5 of a checkpoint over a split, and of each class, in float32.

    Args:
        ten_crop: average the softmax over the ten views of the paper, for each image.
    Raises:
        UserError: a device that is not available, or weights that do not fit.
    """
    with open_world(device) as world:
        model = checkpoint.make_model().to(world.device)
        normalize = Normalize(checkpoint.preprocessing).to(world.device)
        backend = make_backend(
            "auto",
            device="gpu" if world.device.type == "cuda" else "cpu",
            device_id=world.local_rank,
            preprocessing=checkpoint.preprocessing,
            max_batch=EVAL_BATCH,
            num_threads=cpu_share(1),
        )
        with closing(backend):
            loader = Loader(backend, checkpoint.preprocessing)
            batches = loader.eval(dataset, micro_batch=eval_micro_batch(ten_crop), ten_crop=ten_crop)
            precision = choose_precision("fp32", world.device)
            classes = ClassMeter(world.device, len(dataset.classes))
            metrics = evaluate(
                model, normalize, batches, precision, world, num_samples=len(dataset), classes=classes
            )
            return metrics, *classes.reduce(world, dataset)


def write_class_report(
    classes: ClassMeter, world: World, dataset: Dataset, folder: Path | None
) -> ClassReport:
    """Report on the classes, and write the tables to a run's folder, on the rank that has one."""
    counts, report = classes.reduce(world, dataset)
    if folder is not None:
        try:
            write_csv(folder, counts, report)
        except (SaveError, UserError) as error:  # all of it is in the row, too
            log.error(f"the tables of the classes are not written: {error}")
    return report
