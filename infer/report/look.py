"""Runs a checkpoint on validation images: probabilities, its last hidden layer, and Grad-CAM maps.

On the CPU, by torch, so that a report is the same on any machine.
Shapes: N images, H and W rows and columns, C classes, D units of the last hidden layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_pipeline.common.console import show_progress
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.loader import Loader
from data_pipeline.transforms.sampler import permutation_at
from infer.predict.decode import open_decoder, valid_images
from infer.predict.rows import rank_classes
from infer.report.source import short_labels
from train.checkpoints.load import Checkpoint
from train.models.alexnet import AlexNet, Normalize

MAX_IMAGES = 2000
"""Most images that are looked at; of more, these are the first of a fixed random order."""
BATCH = 64


@dataclass(frozen=True, eq=False)
class Look:
    """A checkpoint's outputs for each image that could be read, in the order of the split.

    Attributes:
        model, normalize, loader: of the checkpoint, with which images are read and looked at again.
        class_labels: names of the classes for people, in the order of the logits.
        dataset: the images that were looked at.
        places: (N) int64, where each image is in `dataset`.
        labels: (N) int64, its true class.
        probabilities: (N, C) float32, softmax of the centre crop.
        hidden: (N, D) float32, the activations of the last hidden layer, as the last layer reads them.
        num_failed: images that could not be read.
        num_available: images of the split.
    """

    model: AlexNet
    normalize: Normalize
    loader: Loader
    class_labels: Sequence[str]
    dataset: Dataset
    places: NDArray[np.int64]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    hidden: NDArray[np.float32]
    num_failed: int
    num_available: int

    def name(self, number: int) -> str:
        """The file of one image, relative to the data folder."""
        return self.dataset.name_at(int(self.places[number]))

    def truth(self, number: int) -> str:
        """The name of its class."""
        return self.class_labels[int(self.labels[number])]

    @cached_property
    def found(self) -> NDArray[np.intp]:
        """The most probable class of each image."""
        return rank_classes(self.probabilities, 1)[:, 0]

    @property
    def right(self) -> NDArray[np.bool_]:
        """Return for each image whether its most probable class is the true one."""
        right: NDArray[np.bool_] = self.found == self.labels
        return right

    def pixels(self, numbers: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
        """Read some images again, as the model saw them.

        Returns:
            (H, W, 3) uint8 by number, of those that can still be read.
        """
        unique = sorted(set(numbers))
        if not unique:
            return {}
        found: dict[int, NDArray[np.uint8]] = {}
        batches = self.loader.eval(self.dataset.take(self.places[unique]), micro_batch=BATCH)
        with closing(batches):
            for batch in batches:
                read = [unique[index] for index in batch.indices[batch.valid]]
                found.update(zip(read, valid_images(batch).copy(), strict=True))
        return found

    def activation_map(self, pixels_HWC: NDArray[np.uint8], class_id: int) -> NDArray[np.float32]:
        """See `grad_cam`, for one image."""
        images_NCHW = self.normalize(torch.from_numpy(pixels_HWC)[None])
        return grad_cam(self.model, images_NCHW, class_id)


@contextmanager
def open_look(checkpoint: Checkpoint, split: Dataset) -> Iterator[Look]:
    """Look at up to `MAX_IMAGES` of a split, which can be read again until the end."""
    preprocessing = checkpoint.preprocessing
    model, normalize = checkpoint.make_model(), Normalize(preprocessing)
    dataset = split.take(np.sort(permutation_at(0, 0, len(split))[:MAX_IMAGES]))
    seen, num_failed = [], 0
    with open_decoder(preprocessing, BATCH) as decoder:
        loader = Loader(decoder, preprocessing)
        batches = loader.eval(dataset, micro_batch=BATCH)
        with torch.inference_mode(), closing(batches), show_progress("images", len(dataset)) as progress:
            for batch in batches:
                inputs_NCHW = normalize(torch.from_numpy(valid_images(batch)))
                logits_NC, hidden_ND = model.forward_features(inputs_NCHW, "fc7")
                indices_N, labels_N = batch.indices[batch.valid], batch.labels[batch.valid]
                seen.append((indices_N, labels_N, logits_NC.softmax(dim=1).numpy(), hidden_ND.numpy()))
                num_failed += len(batch.failures)
                progress.advance(len(batch))
        places, labels, probabilities, hidden = map(np.concatenate, zip(*seen, strict=True))
        yield Look(
            model=model,
            normalize=normalize,
            loader=loader,
            class_labels=short_labels(checkpoint.classes, checkpoint.class_labels),
            dataset=dataset,
            places=places,
            labels=labels,
            probabilities=probabilities,
            hidden=hidden,
            num_failed=num_failed,
            num_available=len(split),
        )


def grad_cam(model: AlexNet, images_NCHW: Tensor, class_id: int) -> NDArray[np.float32]:
    """Map the parts of an image that speak for a class: Grad-CAM on the map of the last convolution.

    The plain class-activation map is defined only where a global average stands before the only fully
    connected layer, which AlexNet does not have; Grad-CAM takes the mean gradient of each channel in place
    of its weight.

    Args:
        model: in evaluation mode.
        images_NCHW: one normalised image.
        class_id: the class whose logit is followed.
    Returns:
        (H, W) of the map that the last pooling reads, from 0 to 1; all 0 where nothing speaks for the class.
    Source: Selvaraju et al. 2017, "Grad-CAM", equations 1 and 2.
    """
    pool = [layer for layer in model.modules() if isinstance(layer, nn.MaxPool2d)][-1]
    read: list[Tensor] = []
    hook = pool.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        with torch.enable_grad():
            logits_NC, (map_NCHW,) = model.forward(images_NCHW), read
            (gradient_NCHW,) = torch.autograd.grad(logits_NC[0, class_id], map_NCHW)
    finally:
        hook.remove()
    weights_NC11 = gradient_NCHW.mean(dim=(2, 3), keepdim=True)
    cam_HW = (weights_NC11 * map_NCHW.detach()).sum(dim=1)[0].relu()
    most = float(cam_HW.max())
    found: NDArray[np.float32] = (cam_HW / most if most > 0 else cam_HW).numpy()
    return found
