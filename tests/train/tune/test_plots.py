"""Pictures of benchmarks: the same bytes for the same figures, known as ours, and replaced only then."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.common.errors import UserError
from train.tune.plots import FORMATS, check_picture, draw_panels


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_picture_of_ours_may_be_replaced(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rates{suffix}"
    drawn = set()
    for _ in range(2):
        check_picture(path)
        with draw_panels(path, 1) as (panel,):
            panel.plot([1, 2], [3, 4])
        drawn.add(path.read_bytes())
    assert len(drawn) == 1
    path.write_bytes(path.read_bytes().replace(b"alexnet bench", b"somebody else"))
    with pytest.raises(UserError, match=f"rates{suffix} exists and is not a picture of alexnet bench"):
        check_picture(path)
