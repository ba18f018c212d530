"""What a checkpoint makes of validation images: probabilities, its last hidden layer, and where it looks.

On the CPU, by torch, so that a report is the same on any machine.
Shapes: N images, H and W rows and columns, C classes, D units of the last hidden layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_pipeline.common.console import show_progress
from data_pipeline.datasets.dataset import Dataset
from data_pipeline.decode.backend import make_backend
from data_pipeline.loader import Loader
from data_pipeline.transforms.sampler import permutation_at
from train.checkpoints.load import Checkpoint
from train.distributed.world import cpu_share
from train.models.alexnet import AlexNet, Normalize

MAX_IMAGES = 2000
"""Most images that are looked at; of more, these are the first of a fixed random order."""
BATCH = 64


@dataclass(frozen=True, eq=False)
class Look:
    """What was seen of each image that could be read, in the order of the split.

    Attributes:
        dataset: the images that were looked at.
        places: (N) int64, where each image is in `dataset`.
        labels: (N) int64, its true class.
        probabilities: (N, C) float32, softmax of the centre crop.
        hidden: (N, D) float32, the activations of the last hidden layer, as the last layer reads them.
        num_failed: images that could not be read.
        num_available: images of the split.
    """

    dataset: Dataset
    places: NDArray[np.int64]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    hidden: NDArray[np.float32]
    num_failed: int
    num_available: int


class Looker:
    """A checkpoint's network, and a loader of its images.

    Args:
        checkpoint: whose evaluated weights are used.
        loader: with the checkpoint's preprocessing.
    """

    def __init__(self, checkpoint: Checkpoint, loader: Loader) -> None:
        self._model, self._normalize = checkpoint.make_model(), Normalize(checkpoint.preprocessing)
        self._loader = loader

    def look(self, split: Dataset) -> Look:
        """Look at up to `MAX_IMAGES` of a split."""
        chosen = np.sort(permutation_at(0, 0, len(split))[:MAX_IMAGES])
        dataset = split.take(chosen)
        places: list[NDArray[np.int64]] = []
        labels: list[NDArray[np.int64]] = []
        probabilities: list[NDArray[np.float32]] = []
        hidden: list[NDArray[np.float32]] = []
        num_failed = 0
        batches = self._loader.eval(dataset, micro_batch=BATCH)
        with torch.inference_mode(), closing(batches), show_progress("images", len(dataset)) as progress:
            for batch in batches:
                images_NHWC = torch.from_numpy(np.from_dlpack(batch.images)[batch.valid])
                logits_NC, hidden_ND = self._model.forward_features(self._normalize(images_NHWC), "fc7")
                places.append(batch.indices[batch.valid])
                labels.append(batch.labels[batch.valid])
                probabilities.append(logits_NC.softmax(dim=1).numpy())
                hidden.append(hidden_ND.numpy())
                num_failed += len(batch.failures)
                progress.advance(len(batch))
        return Look(
            dataset=dataset,
            places=np.concatenate(places),
            labels=np.concatenate(labels),
            probabilities=np.concatenate(probabilities),
            hidden=np.concatenate(hidden),
            num_failed=num_failed,
            num_available=len(split),
        )

    def pixels(self, look: Look, numbers: Sequence[int]) -> dict[int, NDArray[np.uint8]]:
        """Read some images again, as the model saw them.

        Args:
            numbers: which of the look's images.
        Returns:
            (H, W, 3) uint8 by number, of those that can still be read.
        """
        unique = sorted(set(numbers))
        if not unique:
            return {}
        found: dict[int, NDArray[np.uint8]] = {}
        batches = self._loader.eval(look.dataset.take(look.places[unique]), micro_batch=BATCH)
        with closing(batches):
            for batch in batches:
                images_NHWC = np.from_dlpack(batch.images)
                for row in np.flatnonzero(batch.valid):
                    found[unique[int(batch.indices[row])]] = images_NHWC[row].copy()
        return found

    def activation_map(self, pixels_HWC: NDArray[np.uint8], class_id: int) -> NDArray[np.float32]:
        """See `grad_cam`, for one image."""
        images_NCHW = self._normalize(torch.from_numpy(pixels_HWC)[None])
        return grad_cam(self._model, images_NCHW, class_id)


@contextmanager
def open_looker(checkpoint: Checkpoint) -> Iterator[Looker]:
    """A looker with its decoder, which is closed at the end."""
    backend = make_backend(
        "auto",
        device="cpu",
        device_id=0,
        preprocessing=checkpoint.preprocessing,
        max_batch=BATCH,
        num_threads=cpu_share(1),
    )
    with closing(backend):
        yield Looker(checkpoint, Loader(backend, checkpoint.preprocessing))


def grad_cam(model: AlexNet, images_NCHW: Tensor, class_id: int) -> NDArray[np.float32]:
    """Which parts of an image speak for a class: Grad-CAM on the map of the last convolution.

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
