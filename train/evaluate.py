"""Evaluate one checkpoint on a split, in float32."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Literal

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.datasets.open import open_dataset
from data_pipeline.loader import Loader, make_backend
from train.checkpoints.load import Checkpoint
from train.distributed.world import cpu_share, open_world
from train.health.metrics import Metrics
from train.models.alexnet import Normalize
from train.optim.precision import choose_precision
from train.step import EVAL_BATCH, eval_micro_batch, evaluate


def load_split(checkpoint: Checkpoint, data: Path | None, split: str) -> Dataset:
    """The images to evaluate a checkpoint by: those of `data`, or of the folder that it was trained on.

    Raises:
        UserError: no such folder, or other classes than the checkpoint's.
    """
    root = data or (Path(checkpoint.config.data.root) if checkpoint.config.data.root is not None else None)
    if root is None:
        raise UserError(f"{checkpoint.folder} does not say what it was trained on: name it with --data DIR")
    dataset = open_dataset(root, split)
    if dataset.classes != checkpoint.classes:
        raise UserError(
            f"{root}/{split} has other classes than {checkpoint.folder} was trained on "
            f"({len(dataset.classes)} and {len(checkpoint.classes)})"
        )
    return dataset


def evaluate_checkpoint(
    checkpoint: Checkpoint,
    dataset: Dataset,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    ten_crop: bool = False,
) -> Metrics:
    """Loss, top-1 and top-5 of a checkpoint over a split, every image once.

    Args:
        ten_crop: average the softmax over the ten views of the paper, for each image.
    Raises:
        UserError: a device that is not here, or weights that do not fit.
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
            return evaluate(model, normalize, batches, precision, world, num_samples=len(dataset))
