"""Models for benchmarks: their weights are random, but the last layer classifies the photographs.

So they go through the exporter and its gate as any checkpoint does, and their accuracy means something.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.datasets.open import open_dataset
from data_pipeline.loader import Loader
from infer.predict.decode import open_decoder, valid_images
from train.bench.images import FOLDER, link_bench_images
from train.checkpoints.format import Snapshot
from train.checkpoints.write import save_checkpoint
from train.config.load import make_config
from train.models.alexnet import Normalize, make_model

RECIPES = {"owt": "imagenet-owt", "paper": "imagenet-paper"}
SHARPNESS = 20.0
"""The logit of a photograph's own class, those of unlike ones being near 0."""


def make_bench_data(folder: Path | None, num_images: int) -> Path:
    """Make a data folder of `num_images` classes of one photograph each, the same for both splits.

    Args:
        folder: where; None for a folder kept among the temporary files.
    """
    root = folder or FOLDER / f"classes-{num_images}"
    names = (f"{s}/photo-{number:04d}/photo.jpg" for s in ("train", "val") for number in range(num_images))
    link_bench_images(root, names, 2 * num_images, num_images)
    return root


def make_bench_checkpoint(variant: str, data: Path, run: Path, overrides: Sequence[str] = ()) -> Path:
    """Write the checkpoint of a network with random weights that classifies the photographs of `data`.

    The last layer is the nearest-mean classifier of what comes out of the one before: in closed form.

    Args:
        variant: a key of `RECIPES`.
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
    with torch.inference_mode(), open_decoder(config.preprocessing, 64) as decoder:
        for batch in Loader(decoder, config.preprocessing).eval(dataset, micro_batch=64):
            network(normalize(torch.from_numpy(valid_images(batch))))
    handle.remove()
    features = torch.cat(seen)  # in the order of the classes, of which each has one photograph
    mean = features.mean(0)
    apart = features - mean
    with torch.no_grad():
        last.weight.copy_(SHARPNESS * apart / apart.norm(dim=1, keepdim=True) / apart.norm(dim=1).mean())
        last.bias.copy_(-last.weight @ mean)
    state = Snapshot(
        step=1, epoch=1, samples_seen=len(dataset), config=config, classes=dataset.classes, metrics={},
        states={"model": network.state_dict()},
    )  # fmt: skip
    save_checkpoint(run / "checkpoints", state)
    return next((run / "checkpoints").glob("step-*"))
