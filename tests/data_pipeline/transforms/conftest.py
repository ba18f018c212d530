"""Decoders that several tests use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from data_pipeline.decode.dali import DaliBackend
from data_pipeline.decode.pillow import PillowBackend


@pytest.fixture(params=["pillow", "dali", "graph"])
def backend(request: pytest.FixtureRequest) -> Iterator[PillowBackend | DaliBackend]:
    made: PillowBackend | DaliBackend = PillowBackend(max_batch=16, num_threads=2)
    if request.param != "pillow":
        made.close()
        made = DaliBackend("cpu", 0, 64, 16, 2, whole_graph=request.param == "graph")
    yield made
    made.close()
