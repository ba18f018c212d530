"""Models for benchmarks: random weights, but for a last layer that tells the photographs apart.

So they go through the exporter and its gate as any checkpoint does, and their accuracy means something.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_pipeline.datasets.open import open_dataset
from data_pipeline.loader import Loader
from infer.predict.decode import open_decoder, valid_images
from train.bench.images import make_bench_folder, write_bench_images
from train.checkpoints.write import State, save_checkpoint
from train.config.load import make_config
from train.models.alexnet import Normalize, make_model

RECIPES = {"owt": "imagenet-owt", "paper": "imagenet-paper"}
SHARPNESS = 20.0
"""Of the softmax: the logit of a photograph's own class, those of unlike ones being near 0."""


def make_bench_data(folder: Path | None, num_images: int) -> Path:
    """A data folder of `num_images` classes of one photograph each, for training and validation alike.

    Args:
        folder: where; None for a folder kept among the temporary files.
    """
    root = make_bench_folder() / f"classes-{num_images}" if folder is None else folder
    if (root / "complete.txt").is_file():
        return root
    photos = sorted(write_bench_images(make_bench_folder() / str(num_images), num_images).rglob("*.jpg"))
    for number, photo in enumerate(photos):
        for split in ("train", "val"):
            target = root / split / f"photo-{number:04d}" / photo.name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists():
                os.link(photo, target)
    (root / "complete.txt").touch()
    return root


def make_bench_checkpoint(variant: str, data: Path, run: Path, overrides: Sequence[str] = ()) -> Path:
    """A checkpoint of a network with random weights that knows the photographs.

    The last layer is the nearest-mean classifier of what comes out of the one before: in closed form.

    Args:
        variant: a key of `RECIPES`.
        data: of `make_bench_data`.
        run: the run's folder.
        overrides: keys of the recipe, `dotted.key=value`.
    Returns:
        The checkpoint's folder.
    """
    config = make_config(RECIPES[variant], [f"model.name={variant}", "model.init=he", *overrides], data)
    dataset = open_dataset(data, "val", quarantine=False)
    torch.manual_seed(0)
    network = make_model(
        config.model, num_classes=len(dataset.classes), crop_px=config.preprocessing.crop_px
    ).eval()
    normalize = Normalize(config.preprocessing)
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    labels: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = []
    with torch.inference_mode(), open_decoder(config.preprocessing, 64) as decoder:
        for batch in Loader(decoder, config.preprocessing).eval(dataset, micro_batch=64):
            labels.append(batch.labels)
            network(normalize(torch.from_numpy(valid_images(batch))))
    handle.remove()
    features = torch.cat(seen)[torch.from_numpy(np.argsort(np.concatenate(labels)))]
    mean = features.mean(0)
    apart = features - mean
    with torch.no_grad():
        last.weight.copy_(SHARPNESS * apart / apart.norm(dim=1, keepdim=True) / apart.norm(dim=1).mean())
        last.bias.copy_(-last.weight @ mean)
    save_checkpoint(
        run / "checkpoints",
        State(
            step=1,
            epoch=1,
            samples_seen=len(dataset),
            config=config,
            classes=dataset.classes,
            metrics={},
            parts={"model": network.state_dict()},
        ),
    )
    return next((run / "checkpoints").glob("step-*"))
