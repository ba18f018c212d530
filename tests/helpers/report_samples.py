"""A small run with everything that a report shows, and names that would do harm in a page."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import torch

from data_pipeline.datasets.open import open_dataset
from data_pipeline.results.class_report import ClassCounts, Mistake, make_class_report, write_csv
from tests.helpers.images import photo
from train.checkpoints.format import Pointer, Snapshot, write_pointer
from train.checkpoints.write import save_checkpoint
from train.config.load import make_config
from train.models.alexnet import make_model
from train.runs.folder import MetricsRow, RunFolder

CLASSES = ('"><img src=x onerror=1>', "<script>alert(1)", "cat & dog")
IMAGES_PER_CLASS = 4


def write_images(root: Path) -> Path:
    """Three classes of validation images, one of which cannot be read."""
    for label, name in enumerate(CLASSES):
        folder = root / "val" / name
        folder.mkdir(parents=True)
        for number in range(IMAGES_PER_CLASS):
            photo(64, 64, seed=5 * label + number).save(folder / f"{number}.png")
    (root / "val" / CLASSES[2] / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n no more")
    return root


def write_run(folder: Path, data: Path) -> Path:
    """A finished run of two epochs on these images."""
    config = make_config("demo", ['recipe="<i>odd"', "model.hidden_units=16", "epochs=2"], data)
    torch.manual_seed(0)
    network = make_model(config.model, num_classes=3, crop_px=config.preprocessing.crop_px)
    last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(8)
    val = open_dataset(data, "val")
    snapshot = Snapshot(
        step=20,
        epoch=2,
        samples_seen=1280,
        config=config,
        classes=CLASSES,
        metrics={"top1": 0.5, "top5": 1.0, "loss": 0.7},
        states={"model": network.state_dict()},
        data={"val": val.contents()},
    )
    checkpoints = folder / "checkpoints"
    save_checkpoint(checkpoints, snapshot)
    write_pointer(checkpoints, "best", Pointer(step=20, top1=0.5))
    run = RunFolder(folder)
    run.write_config(config)
    counts = ClassCounts(np.array([[2, 1, 1], [0, 3, 1], [3, 0, 1]]), np.array([4, 4, 4]))
    mistakes = [Mistake(path="val/x/<u>.png", truth=CLASSES[0], predicted=CLASSES[1], probability=0.98)]
    report = make_class_report(counts, CLASSES, CLASSES, mistakes)
    write_csv(folder, counts, report)
    for step in range(2, 21, 2):
        loss = None if step == 6 else 1 / step  # NaN is null
        run.append(_row("train", step, loss, 0.5))
        if step in (10, 20):
            run.append(_row("val", step, 0.4, step / 40))
    run.append(msgspec.structs.replace(_row("val", 20, 0.4, 0.5), report=report))
    return folder


def _row(split: str, step: int, loss: float | None, top1: float) -> MetricsRow:
    return MetricsRow(
        split=split,
        epoch=-(-step // 10),
        step=step,
        samples=12,
        failed=0,
        loss=loss,
        top1=top1,
        top5=1.0,
        lr=0.1 / step,
        images_per_s=100.0 + step,
        time=1000.0 + step,
    )
