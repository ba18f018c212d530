"""DALI's fast way where it cannot be taken: it is given up with one line, and the pixels stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.datasets.open import open_dataset
from data_pipeline.decode import dali as dali_module
from data_pipeline.decode.dali import DaliBackend
from data_pipeline.decode.dali_graph import Graph, GraphSpec, Place
from data_pipeline.loading.scan import with_table
from tests.helpers.feed_batches import pixels, train
from tests.helpers.images import write_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_folder(tmp_path / "train", {"a": 24, "b": 24})
    return tmp_path


def test_device_without_the_fast_way_decodes_windows(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened: list[GraphSpec] = []

    class Refusing(Graph):
        def __init__(self, spec: GraphSpec, place: Place) -> None:
            opened.append(spec)
            if spec.decode == "whole":
                raise RuntimeError("traceback\nnvJPEG is missing")
            super().__init__(spec, place)

    dataset = with_table(open_dataset(root, "train"), 1)
    backend = DaliBackend("cpu", 0, 32, 16, 2, whole_graph=True)
    want = train(dataset, backend)
    backend.close()
    monkeypatch.setattr(dali_module, "Graph", Refusing)
    backend = DaliBackend("cpu", 0, 32, 16, 2, whole_graph=True)
    got = train(dataset, backend)
    backend.close()
    assert [(spec.decode, spec.depth) for spec in opened] == [("whole", 3), ("window", 1)]
    assert np.array_equal(pixels(got), pixels(want))
    assert caplog.messages == [
        "DALI's fast way fails on this cpu (nvJPEG is missing): windows are decoded, a batch at a time, more "
        "slowly"
    ]


def test_fast_way_that_refuses_good_files_is_given_up(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = with_table(open_dataset(root, "train"), 1)
    backend = DaliBackend("cpu", 0, 32, 16, 2, whole_graph=True)
    want = train(dataset, backend)
    decode_fast = backend.decode_fast
    monkeypatch.setattr(
        backend, "decode_fast", lambda plan: None if backend.max_batch_bytes else decode_fast(plan)
    )
    got = train(dataset, backend)
    backend.close()
    assert np.array_equal(pixels(got), pixels(want))
    assert [message for message in caplog.messages if "fast way" in message] == [
        "DALI's fast way fails on this cpu (it refuses batches without a bad file): windows are decoded, a "
        "batch at a time, more slowly"
    ]
