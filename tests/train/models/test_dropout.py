"""Dropout masks are those of the recipe in NumPy, look random, and leave no state anywhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipeline.transforms.sampler import rank_slice
from tests.helpers.dropout_reference import kept_units, layer_key
from train.config.schema import ModelConfig
from train.models.alexnet import make_model
from train.models.dropout import Dropout, Masks, kept_at, layer_keys_at, masks_of, threshold_at

# Shapes: N samples, D units, L layers.

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZE = (256, 1024)


def mask_of(seed: int = 0, step: int = 0, layer: int = 0, first_row: int = 0, p: float = 0.5) -> Tensor:
    """A mask of 256 samples and 1,024 units."""
    rows_N = torch.arange(first_row, first_row + SIZE[0], dtype=torch.int32)
    keys_L2 = torch.from_numpy(layer_keys_at(seed, step, 2))
    return kept_at(rows_N, keys_L2[layer], SIZE[1], p)


def make_dropout(p: float, rows: list[int] | None = None, device: str = "cpu") -> Dropout:
    """The second of two layers, at step 3 of a run with seed 7."""
    masks = Masks(2)
    masks.keys_L2 = torch.from_numpy(layer_keys_at(7, 3, 2)).to(device)
    masks.rows_N = None if rows is None else torch.tensor(rows, dtype=torch.int32, device=device)
    return Dropout(p, 1, masks)


@pytest.mark.parametrize("seed", [0, 7, 2**63, -5])
def test_keys_of_layers_are_those_in_plain_integers(seed: int) -> None:
    keys_L2 = layer_keys_at(seed, 1_000_000, 3)
    assert keys_L2.dtype == np.int32
    expected = [layer_key(seed, 1_000_000, layer) for layer in range(3)]
    assert keys_L2.view(np.uint32).tolist() == [list(words) for words in expected]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9, 1 - 2**-40])
def test_masks_are_those_of_the_recipe_in_numpy(p: float, device: str) -> None:
    """Of rows near both ends of int32, and more elements than a CPU makes at once."""
    rows = [*range(20), 1_281_166, 2**31 - 1]
    rows_N = torch.tensor(rows, dtype=torch.int32, device=device)
    keys_2 = torch.from_numpy(layer_keys_at(7, 3, 2)).to(device)[1]
    kept_ND = kept_at(rows_N, keys_2, 9216, p).cpu().numpy()
    assert np.array_equal(kept_ND, kept_units(7, 3, 1, rows, range(9216), p))
    assert kept_ND.mean() == pytest.approx(1 - p, abs=0.01)


def test_masks_never_change_from_version_to_version() -> None:
    """A resumed run must have the masks of the run that it resumes."""
    rows_N, keys_L2 = torch.tensor([0, 5], dtype=torch.int32), torch.from_numpy(layer_keys_at(1, 2, 2))
    drawn = [np.packbits(kept_at(rows_N, keys_2, 32, 0.5).numpy()).tobytes().hex() for keys_2 in keys_L2]
    assert drawn == ["99700fcf26e88d95", "9c52fd9960005603"]


def test_threshold_is_exact_at_both_ends() -> None:
    assert [threshold_at(p) for p in (0.0, 0.25, 0.5, 1 - 2**-53)] == [-(2**31), -(2**30), 0, 2**31 - 1]


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_masks_of_neighbours_are_uncorrelated(p: float) -> None:
    """Units, rows, layers, steps, seeds and places in the epoch, each within 5 sigma of nothing."""
    sigma = math.sqrt(p * (1 - p))
    base_ND = mask_of(p=p)
    assert base_ND.float().mean().item() == pytest.approx(1 - p, abs=5 * sigma / math.sqrt(base_ND.numel()))
    z_ND = (base_ND.double() - (1 - p)) / sigma
    others = {
        "next layer": mask_of(layer=1, p=p), "next step": mask_of(step=1, p=p), "next seed": mask_of(1, p=p),
        "step for seed": mask_of(1, 0, p=p), "next epoch's rows": mask_of(first_row=SIZE[0], p=p),
    }  # fmt: skip
    pairs = {name: (z_ND, (other.double() - (1 - p)) / sigma) for name, other in others.items()}
    for lag in (1, 2, 3, 64):
        pairs[f"{lag} units on"] = (z_ND[:, lag:], z_ND[:, :-lag])
        pairs[f"{lag} rows on"] = (z_ND[lag:], z_ND[:-lag])
    pairs["the same row, shifted"] = (z_ND[1:, 1:], z_ND[:-1, :-1])
    scores = {name: ((a * b).sum() / math.sqrt(a.numel())).item() for name, (a, b) in pairs.items()}
    assert max(map(abs, scores.values())) < 5, scores
    # no sample and no unit has more drops than chance gives it
    for dim, others_of in ((1, SIZE[0]), (0, SIZE[1])):
        spread = (z_ND.sum(dim) / math.sqrt(SIZE[dim])).square().mean().item()
        assert spread == pytest.approx(1, abs=5 * math.sqrt(2 / others_of))


def test_any_two_rows_of_a_mask_are_uncorrelated() -> None:
    """Their correlations are spread as those of coins, and none is large: no row repeats another, shifted."""
    z_ND = mask_of().double() * 2 - 1
    scores = torch.corrcoef(z_ND).fill_diagonal_(0) * math.sqrt(SIZE[1])
    num_pairs = SIZE[0] * (SIZE[0] - 1) / 2
    spread = (scores.square().sum() / 2 / num_pairs).item()
    assert spread == pytest.approx(1, abs=5 * math.sqrt(2 / num_pairs))
    spectra = torch.fft.rfft(z_ND)
    shifted = torch.fft.irfft(spectra[1:] * spectra[:-1].conj()) / math.sqrt(SIZE[1])
    assert 3 < shifted.abs().max().item() < 6.5  # of 261,120 shifts of a row against the next


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("p", [0.2, 0.5])
def test_output_and_gradient_are_scaled_where_kept(p: float, kind: torch.dtype) -> None:
    rows = [3, 4, 900]
    x_ND = torch.randn(3, 700, dtype=kind, requires_grad=True)
    grad_ND = torch.randn(3, 700, dtype=kind)
    out_ND = make_dropout(p, rows)(x_ND)
    out_ND.backward(grad_ND)
    kept_ND = torch.from_numpy(kept_units(7, 3, 1, rows, range(700), p))
    assert x_ND.grad is not None
    assert out_ND.dtype == x_ND.grad.dtype == kind
    assert torch.equal(out_ND, torch.where(kept_ND, x_ND * (1 / (1 - p)), 0))
    assert torch.equal(x_ND.grad, torch.where(kept_ND, grad_ND * (1 / (1 - p)), 0))


def test_one_byte_an_element_is_kept_for_the_backward_pass() -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        make_dropout(0.5)(torch.ones(8, 100, requires_grad=True))
    assert [(tensor.dtype, tensor.numel()) for tensor in saved if tensor.numel() > 1] == [(torch.bool, 800)]


def test_dropout_is_the_identity_where_nothing_is_dropped() -> None:
    x_ND = torch.randn(4, 10)
    assert make_dropout(0.5).eval()(x_ND) is x_ND
    assert make_dropout(0.0)(x_ND) is x_ND
    assert make_dropout(0.5, [])(x_ND[:0]).shape == (0, 10)


def test_rows_of_another_pass_are_refused() -> None:
    with pytest.raises(AssertionError, match="rows of the masks are those of another pass"):
        make_dropout(0.5, [0, 1, 2])(torch.ones(4, 10))
    ones_ND = torch.ones(4, 10)  # without rows, the samples are counted
    assert torch.equal(make_dropout(0.5)(ones_ND), make_dropout(0.5, [0, 1, 2, 3])(ones_ND))


def test_split_layers_have_their_part_of_the_whole_mask() -> None:
    whole_ND = make_dropout(0.5, [8, 2, 5])(torch.ones(3, 11))
    parts = []
    for units in (rank_slice(11, rank, 3) for rank in range(3)):
        split = make_dropout(0.5, [8])  # this rank's samples; the layer has those of all ranks
        split.masks.rows_B = torch.tensor([8, 2, 5], dtype=torch.int32)
        split.first_unit = units.start
        parts.append(split(torch.ones(3, units.stop - units.start)))
    assert torch.equal(torch.cat(parts, dim=1), whole_ND)


@pytest.mark.parametrize("name", ["paper", "owt"])
def test_masks_of_a_network_are_no_part_of_its_state(name: str) -> None:
    network = make_model(ModelConfig(name=name, hidden_units=32), num_classes=4, crop_px=64)  # type: ignore[arg-type]
    layers = [module for module in network.modules() if isinstance(module, Dropout)]
    assert [(layer.p, layer.layer) for layer in layers] == [(0.5, 0), (0.5, 1)]
    assert all(layer.masks is masks_of(network) for layer in layers)
    names = [name for name, _ in (*network.named_parameters(), *network.named_buffers())]
    assert list(network.state_dict()) == names and not any("drop" in name for name in names)
    before = torch.get_rng_state()
    network(torch.zeros(2, 3, 64, 64))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.usefixtures("no_compile_threads")
def test_compiled_masks_are_the_eager_ones_at_every_step() -> None:
    """Values that change from step to step are no constants of the compiled code."""
    graphs: list[int] = []
    dropout = make_dropout(0.2, [0, 1, 2])
    compiled = nn.Sequential(dropout)
    compiled.compile(dynamic=False)
    x_ND = torch.randn(3, 9216, dtype=torch.bfloat16)
    found = []
    for step in range(3):
        dropout.masks.keys_L2 = torch.from_numpy(layer_keys_at(0, step, 2))
        dropout.masks.rows_N = torch.tensor([step, 5, 70_000], dtype=torch.int32)
        leaf_ND = x_ND.clone().requires_grad_()
        out_ND = compiled(leaf_ND)
        out_ND.backward(torch.ones_like(out_ND))
        found.append(out_ND.detach())
        assert torch.equal(out_ND, dropout(x_ND)), step
        assert leaf_ND.grad is not None and torch.equal(leaf_ND.grad != 0, out_ND != 0)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert not torch.equal(found[0], found[1])
    assert len(set(graphs)) == 1
