"""A checkpoint's outputs for images: Grad-CAM beside its formula, neighbours beside a loop."""

from __future__ import annotations

import math

import numpy as np
import torch

from infer.report.look import grad_cam
from infer.report.pictures import nearest, overlay
from train.config.load import make_config
from train.models.alexnet import make_model


def test_grad_cam_is_its_formula() -> None:
    config = make_config("demo", ["model.hidden_units=16"])
    torch.manual_seed(0)
    model = make_model(config.model, num_classes=3, crop_px=config.preprocessing.crop_px).eval()
    side = config.preprocessing.crop_px
    images_NCHW = torch.randn(1, 3, side, side)
    found_HW = grad_cam(model, images_NCHW, 2)

    # In two halves, with the map between them as a leaf.
    map_NCHW = model.features[:-1](images_NCHW).detach().requires_grad_()
    logits_NC = model.classifier(model.avgpool(model.features[-1](map_NCHW)).flatten(1))
    logits_NC[0, 2].backward()
    assert map_NCHW.grad is not None
    activations_CHW, gradients_CHW = map_NCHW.detach().numpy()[0], map_NCHW.grad.numpy()[0]
    wanted_HW = np.zeros(found_HW.shape)
    for activation_HW, gradient_HW in zip(activations_CHW, gradients_CHW, strict=True):
        wanted_HW += gradient_HW.mean() * activation_HW
    wanted_HW = np.maximum(wanted_HW, 0)
    assert wanted_HW.max() > 0 and (wanted_HW == 0).any(), "some parts speak for the class, others do not"
    assert np.allclose(found_HW, wanted_HW / wanted_HW.max(), atol=1e-5)


def test_neighbours_are_those_of_a_loop() -> None:
    hidden_ND = np.random.default_rng(0).integers(0, 3, (40, 3)).astype(np.float32)  # with equal ones
    nearest_NK, distances_NK = nearest(hidden_ND, 5)
    for number, row_D in enumerate(hidden_ND):
        others = [(math.dist(row_D, hidden_ND[other]), other) for other in range(40) if other != number]
        assert list(zip(distances_NK[number], nearest_NK[number], strict=True)) == sorted(others)[:5]


def test_overlay_marks_what_the_map_says() -> None:
    pixels_HWC = np.full((8, 8, 3), (200, 100, 50), dtype=np.uint8)
    cam_HW = np.array([[1, 0], [0, 0]], dtype=np.float32)
    shown_HWC = overlay(pixels_HWC, cam_HW)
    assert shown_HWC[7, 7].tolist() == [124] * 3, "grey where nothing speaks for the class"
    assert shown_HWC[0, 0].tolist() == [186, 103, 37], "30% grey and 70% orange"
