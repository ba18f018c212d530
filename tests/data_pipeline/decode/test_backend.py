"""Which decoder is chosen: DALI where it is installed, Pillow otherwise, and on the CPU alone."""

from __future__ import annotations

import logging
import sys

import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.decode.backend import make_backend
from data_pipeline.transforms.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(resize_px=36, crop_px=32)


def test_pillow_decodes_without_dali_with_a_log_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for name in ("dali", "dali_graph"):
        monkeypatch.delitem(sys.modules, f"data_pipeline.decode.{name}", raising=False)
    with caplog.at_level(logging.INFO, "data_pipeline"):
        chosen = make_backend("auto", device="cpu", preprocessing=PREPROCESSING, max_batch=4, num_threads=1)
    chosen.close()
    assert chosen.name == "pillow"
    assert caplog.messages == ["DALI is not installed: Pillow decodes, on the CPU"]
    with pytest.raises(UserError, match="DALI is not installed: pip install"):
        make_backend("dali", device="cpu", preprocessing=PREPROCESSING, max_batch=4, num_threads=1)


def test_pillow_on_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match="decodes on the CPU only"):
        make_backend("pillow", device="gpu", preprocessing=PREPROCESSING, max_batch=4, num_threads=1)
