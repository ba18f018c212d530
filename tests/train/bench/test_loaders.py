"""The loaders of `alexnet bench data`: each makes the batches that are timed, without a GPU too."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from train.bench import loaders
from train.bench.images import write_bench_images
from train.bench.loaders import LoaderCase, MakeBatches, Subject, time_batches


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        loaders.cached_loader,
        partial(loaders.cached_loader, on_device=True),
        loaders.dali_reader,
        loaders.our_loader,
        loaders.torchvision_loader,
    ],
)
def test_fast_loaders_make_the_batches_they_are_asked_for(
    tmp_path: Path, make: Callable[..., MakeBatches]
) -> None:
    """On the CPU, by the code that a GPU runs too: only the device is another."""
    folder = write_bench_images(tmp_path / "small", 40, sides=(64, 64), spread=0.0)
    subject = Subject("any", make, folder, 2, batch=8, crop_px=56, overlaps=True)
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        case = LoaderCase(stack, subject)
        figures = case.measure(6)
        assert set(figures) == {"images_per_s", "cpu_us", "overlap_images_per_s"}
        assert min(figures.values()) > 0
        assert list(case.batches(3)) == [8, 8, 8]
        assert len(case.memory(3, 40)["memory_mb"]) == 3


def test_bench_round_is_timed_from_first_to_last_batch() -> None:
    def batches(count: int) -> Generator[int, None, None]:
        time.sleep(0.3)  # filling the pipeline
        for _ in range(count):
            yield 10

    rate, busy_us = time_batches(batches(5), 4, 0.05)
    assert 40 / 0.5 < rate <= 40 / 0.2
    assert 0 <= busy_us < 1e6 * 0.05 / 10  # it sleeps


@pytest.mark.parametrize(("batch", "expected"), [(64, 15), (128, 70), (256, 30), (4096, 10)])
def test_bench_rounds_of_fast_loaders_are_ten_times_longer(
    monkeypatch: pytest.MonkeyPatch, batch: int, expected: int
) -> None:
    def make(subject: Subject, _stack: ExitStack) -> MakeBatches:
        def batches(count: int) -> Generator[int, None, None]:
            counts.append(count)
            for _ in range(count):
                time.sleep(1e-4)
                yield subject.batch

        return batches

    counts: list[int] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with ExitStack() as stack:
        LoaderCase(stack, Subject("any", make, Path(), 1, batch)).measure(15)
    assert counts == [3, expected + 1]
