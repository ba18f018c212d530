"""The running average of the weights: its formula, what must not move it, and whose weights are used when."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from data_pipeline.common.errors import CorruptFileError
from train.optim.ema import ModelEma

NO, YES = torch.tensor(0.0), torch.tensor(1.0)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def change(net: nn.Module, value: float) -> None:
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.fill_(value)


def test_ema_is_its_formula_with_a_warm_up() -> None:
    net = network()
    change(net, 1.0)
    average = ModelEma(net, decay=0.5)
    expected = 1.0
    for step, value in enumerate((2.0, 4.0, 3.0, 8.0, 6.0, 7.0, 5.0, 1.0, 2.0, 9.0, 3.0)):
        change(net, value)
        average.update(net, torch.tensor(average.share_at(step)), NO)
        keep = min(0.5, (1 + step) / (10 + step))
        assert (keep < 0.5) is (step < 8)
        expected = keep * expected + (1 - keep) * value
        assert average.values["0.weight"].numpy() == pytest.approx(expected, rel=1e-5)
        assert average.values["1.running_var"].numpy() == pytest.approx(expected, rel=1e-5)
        assert average.values["1.num_batches_tracked"].item() == int(value)


def test_ema_does_not_move_in_a_skipped_step() -> None:
    net = network()
    average = ModelEma(net, decay=0.9)
    change(net, 3.0)
    average.update(net, torch.tensor(average.share_at(0)), NO)
    before = {name: value.clone() for name, value in average.values.items()}
    # the weights are where they were: they would pull the average on
    average.update(net, torch.tensor(average.share_at(1)), YES)
    assert all(torch.equal(value, before[name]) for name, value in average.values.items())
    average.update(net, torch.tensor(average.share_at(2)), NO)
    assert not torch.equal(average.values["0.weight"], before["0.weight"])


def test_ema_gives_the_weights_back_on_every_path() -> None:
    net = network()
    change(net, 1.0)
    average = ModelEma(net, decay=0.9)
    change(net, 2.0)
    with pytest.raises(ZeroDivisionError), average.swapped_in(net):
        assert {value.unique().item() for value in net.state_dict().values()} == {1.0}
        raise ZeroDivisionError
    assert {value.unique().item() for value in net.state_dict().values()} == {2.0}
    assert {value.unique().item() for value in average.values.values()} == {1.0}


def test_saved_average_is_restored_and_a_missing_one_refused() -> None:
    net = network()
    average, other = ModelEma(net, decay=0.9), ModelEma(network(), decay=0.9)
    other.load(average.values)
    assert all(torch.equal(value, average.values[name]) for name, value in other.values.items())
    assert other.values["0.weight"].data_ptr() != average.values["0.weight"].data_ptr()
    for wrong in ({}, {**average.values, "0.weight": torch.zeros(2, 2)}):
        with pytest.raises(CorruptFileError, match="no average of these weights"):
            other.load(wrong)
