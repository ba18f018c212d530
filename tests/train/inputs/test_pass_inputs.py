"""The inputs of a step: all that a batch has, in one copy beside the images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipeline.transforms.augment import Augment
from data_pipeline.transforms.erase import erase_boxes_at
from data_pipeline.transforms.mix import mix_params_at
from data_pipeline.transforms.trivial import trivial_params_at
from tests.helpers.step_samples import small_batch
from train.inputs.packed import ALIGNMENT, StaticArrays, layout_of
from train.inputs.pass_inputs import arrays_of, make_inputs
from train.inputs.trivial import pack_trivial

CPU = torch.device("cpu")
AUGMENT = Augment(trivial=True, erase=0.9, mixup=0.4, cutmix=1.0)


def test_inputs_are_the_batchs_arrays() -> None:
    batch = small_batch(
        trivial=trivial_params_at(1, 0, np.arange(4), AUGMENT),
        erase=erase_boxes_at(1, 0, np.arange(4), AUGMENT, 32),
        mix=mix_params_at(1, 0, np.arange(4), AUGMENT, 32),
    )
    batch.valid[2] = False
    inputs = make_inputs(replace(batch, positions=np.array([7, 3, 2**31 - 1, 0])), CPU)
    assert batch.trivial is not None and batch.mix is not None and inputs.mix is not None
    for tensor, array in (
        (inputs.images, batch.images),
        (inputs.labels, batch.labels),
        (inputs.valid, batch.valid),
        (inputs.rows, np.array([7, 3, 2**31 - 1, 0], np.int32)),
        (inputs.trivial, pack_trivial(batch.trivial, 32)),
        (inputs.erase, batch.erase),
        (inputs.mix.partners, batch.mix.partners),
        (inputs.mix.weights, batch.mix.weights),
        (inputs.mix.boxes, batch.mix.boxes),
        (inputs.mix.label_weights, batch.mix.label_weights),
    ):
        assert tensor is not None and array is not None
        assert tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array)
    plain = make_inputs(small_batch(), CPU)
    assert plain.trivial is None and plain.erase is None and plain.mix is None and plain.valid.all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_packed_arrays_can_be_written_over_in_place(device: str) -> None:
    first, second = (arrays_of(small_batch(), 32) for _ in range(2))
    second["labels_"] = np.arange(3.0)
    layout = layout_of(second)
    assert layout != layout_of(first) and layout == layout_of(arrays_of(small_batch(), 32) | second)
    assert [field.start % ALIGNMENT for field in layout] == [0] * 4
    static = StaticArrays(second, torch.device(device))
    views = static.tensors
    for value in (2.0, 5.0):
        second["labels_"][:] = value
        static.write(second)
        assert views["labels_"].tolist() == [value] * 3 and views["labels"].tolist() == [0, 1, 2, 3]
    assert views["labels_"].dtype == torch.float64 and views["valid"].dtype == torch.bool
