"""Opens a run's data: both splits with their sample tables, the decoder, and decoded pixels that are kept."""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import usable_cores
from data_pipeline.datasets.dataset import Dataset, check_same_classes
from data_pipeline.datasets.demo import DEMO_ROOT, write_demo
from data_pipeline.datasets.open import open_dataset
from data_pipeline.loader import Loader, make_backend
from data_pipeline.loading.scan import with_table
from train.config.schema import RunConfig
from train.distributed.ddp import micro_batch_size
from train.distributed.world import World, cpu_share
from train.evaluate import EVAL_BATCH

log = logging.getLogger("train")


def open_data(config: RunConfig, world: World) -> tuple[Dataset, Dataset]:
    """Open the training and validation splits; the demo data is written first if it is configured.

    One rank of each machine looks at the images, if no table of them is kept; the others wait.

    Raises:
        UserError: no data folder named, or one without the expected layout.
    """
    if config.data.root is None:
        raise UserError(f"recipe {config.recipe} needs data: --data DIR, with train/ and val/ in it")
    root = Path(config.data.root)
    if root == DEMO_ROOT:
        if world.local_rank == 0:
            write_demo(root)
        world.barrier()
    train_set, val_set = open_dataset(root, "train"), open_dataset(root, "val")
    check_same_classes(train_set, val_set)
    with world.first_of_machine("the images are looked at"):
        return with_table(train_set, usable_cores()), with_table(val_set, usable_cores())


def open_loader(
    config: RunConfig, world: World, datasets: tuple[Dataset, Dataset], stack: ExitStack
) -> Loader:
    """Open the decoder, without pixels that are kept."""
    backend = make_backend(
        config.data.backend,
        device="gpu" if world.device.type == "cuda" and config.data.backend != "pillow" else "cpu",
        device_id=world.local_rank,
        preprocessing=config.preprocessing,
        max_batch=max(micro_batch_size(config, world), EVAL_BATCH),
        num_threads=config.data.threads or cpu_share(world.local_world_size),
        deterministic=config.data.deterministic,
        max_decoded_bytes=int(config.data.max_decoded_gb * 1e9),
    )
    stack.enter_context(closing(backend))
    return Loader(backend, config.preprocessing, prefetch=config.data.prefetch)
