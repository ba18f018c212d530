"""Compiled LRN and networks: the same numbers as eager ones, and a log line where there is no compiler."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config
from torch.utils import cpp_extension

from tests.helpers.step_samples import small_batch, small_trainer
from train.compile.choose import (
    compile_step,
    count_elements,
    drop_toolkit_note,
    fuse_lrn,
    maybe_compile,
    prepare_lrn,
)
from train.distributed.world import World, open_world
from train.models.lrn import LocalResponseNorm
from train.step import train_step

pytestmark = pytest.mark.slow


@pytest.fixture
def world() -> Iterator[World]:
    with open_world("cpu") as one:
        yield one


@pytest.mark.usefixtures("no_compile_threads")
def test_fused_lrn_matches_eager(world: World, caplog: pytest.LogCaptureFixture) -> None:
    parts = small_trainer(world, "model.name=paper", "precision=bf16")
    arguments: dict[str, Any] = {"crop_px": 32, "precision": parts.precision, "world": world}
    numbers = count_elements(parts.network, 32)
    assert numbers == sum(c * side**2 for c, side in ((96, 26), (256, 12)))
    with caplog.at_level(logging.INFO, "train"):
        prepare_lrn(parts.network, "auto", num_images=1000, **arguments)
        layers = [m for m in parts.network.modules() if isinstance(m, LocalResponseNorm)]
        assert [layer.fused for layer in layers] == [False, False]
        prepare_lrn(parts.network, "auto", num_images=10**7, **arguments)
    said = [record.message for record in caplog.records]
    assert [layer.fused for layer in layers] == [True, True], said
    assert "too short to gain" in said[0] and "LRN compiled in" in said[-1]
    for kind, memory_format in (
        (torch.bfloat16, torch.channels_last),
        (torch.float32, torch.contiguous_format),
    ):
        # Large values, so that the normalisation is far from the identity.
        x = (torch.randn(3, 96, 26, 26) * 200).to(kind).contiguous(memory_format=memory_format)
        grad, results = torch.randn_like(x), []
        for fused in (True, False):
            module = LocalResponseNorm()
            module.fused = fused
            leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
            out = module(leaf)
            out.backward(grad)
            assert leaf.grad is not None
            results.append((out.detach(), leaf.grad))
        assert (results[0][0] - x).abs().max() > 50
        for ours, theirs in zip(*results, strict=True):
            rtol, atol = (1e-5, 1e-5) if kind == torch.float32 else (2**-7, 1e-2)
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
            assert ours.is_contiguous(memory_format=memory_format)


@pytest.mark.usefixtures("no_compile_threads")
def test_fused_lrn_gradient_in_float64() -> None:
    module = LocalResponseNorm(5, 0.3, 0.75, 2.0)
    module.fused = True
    x = torch.randn(2, 7, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,))


@pytest.mark.usefixtures("no_compile_threads", "thin")
def test_compiled_network_computes_the_same_and_stays_if_faster(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    eager, other = (small_trainer(world, "precision=fp32", "model.dropout=0.5") for _ in range(2))
    before = {name: value.clone() for name, value in other.network.state_dict().items()}
    with caplog.at_level(logging.INFO, "train"):
        chosen = maybe_compile(other.parallel, 4, 32, other.precision, world, tmp_path)
        assert maybe_compile(other.parallel, 4, 32, other.precision, world, tmp_path) is chosen
    first, second = (record.message for record in caplog.records if record.name == "train")
    word = "" if chosen else "not "
    assert f"s as it is: the network is {word}compiled" in first
    assert second == f"the network is {word}compiled, as it was when the run began"
    assert json.loads((tmp_path / "compiled.json").read_text()) is chosen
    assert all(torch.equal(value, before[name]) for name, value in other.network.state_dict().items())
    compile_step(other.network)
    losses = [
        [train_step(t, [small_batch()], 1e-3, step).reduce(world).loss for step in range(2)]
        for t in (eager, other)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][1]


@pytest.mark.usefixtures("thin")
def test_network_is_compiled_untimed_where_bits_must_repeat(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, passes = small_trainer(world, "precision=fp32"), []

    def time_passes(*arguments: Any, rounds: int = 3) -> float:
        passes.append(rounds)
        return 1.0

    monkeypatch.setattr("train.compile.choose._time_passes", time_passes)
    monkeypatch.setattr("train.compile.choose.compile_step", lambda network: None)
    with caplog.at_level(logging.INFO, "train"):
        assert maybe_compile(parts.parallel, 4, 32, parts.precision, world, tmp_path, timed=False)
    assert caplog.messages == ["the network is compiled (0 s), and not timed: deterministic=true"]
    assert passes == [1] and json.loads((tmp_path / "compiled.json").read_text()) is True


@pytest.mark.usefixtures("no_compile_threads", "thin")
def test_lrn_runs_eagerly_and_logs_it_without_a_compiler(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parts = small_trainer(world, "model.name=paper", "precision=fp32")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    with inductor_config.patch({"cpp.cxx": (None, "no-compiler")}), caplog.at_level(logging.INFO, "train"):
        fuse_lrn(parts.network, 32, parts.precision, world)
    torch._dynamo.reset()
    assert not any(m.fused for m in parts.network.modules() if isinstance(m, LocalResponseNorm))
    (line,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "LRN runs without a compiler, several times slower" in line and "no-compiler" in line
    parts.network(torch.zeros(2, 3, 32, 32)).sum().backward()


def test_note_on_a_toolkit_without_a_gpu_is_dropped_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    logger = logging.getLogger("torch.utils.cpp_extension")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "propagate", True)
    assert cpp_extension._find_cuda_home() == "/opt/cuda"
    drop_toolkit_note()
    assert cpp_extension._find_cuda_home() == "/opt/cuda"
    logger.warning("another")
    said = [record.getMessage() for record in caplog.records]
    assert said == ["No CUDA runtime is found, using CUDA_HOME='/opt/cuda'", "another"]
