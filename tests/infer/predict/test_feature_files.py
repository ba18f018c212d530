"""Files of features: row groups and blocks, whole or absent, and told from files of others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import infer.predict.feature_files
from infer.predict.feature_files import FeatureInfo, feature_files, is_features, open_features
from infer.predict.rows import ErrorRow, FeatureRow, Row
from infer.search.read import open_feature_file

INFO = FeatureInfo(bundle_sha256="0" * 64, network="paper", layer="fc6", num_features=3)
FEATURES = np.arange(15, dtype=np.float32).reshape(5, 3)
ROWS: list[Row] = [
    FeatureRow(path=f"{number}.jpg", predictions=(), features=one) for number, one in enumerate(FEATURES)
]
ROWS[3] = ErrorRow(path="3.jpg", error="empty file")


def write(output: Path, rows: list[Row]) -> None:
    with open_features(output, INFO) as writer:
        for row in rows:
            writer.write(row)


@pytest.mark.parametrize("name", ["F.parquet", "F.npy"])
def test_features_are_read_in_blocks(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infer.predict.feature_files, "BLOCK_BYTES", 2 * 3 * 4)
    write(tmp_path / name, ROWS)
    file = open_feature_file(tmp_path / name)
    assert file.info == INFO
    blocks = list(file.blocks())
    assert [(first, len(block)) for first, block in blocks] == [(0, 2), (2, 2), (4, 1)]
    found = np.concatenate([block.features for block in blocks])
    assert np.isnan(found[3]).all() and np.array_equal(found[[0, 1, 2, 4]], FEATURES[[0, 1, 2, 4]])
    assert file.paths_of({4, 1, 3}) == {1: "1.jpg", 3: "3.jpg", 4: "4.jpg"}


@pytest.mark.parametrize("name", ["F.parquet", "F.npy"])
def test_files_of_features_are_whole_or_as_before(tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    for before in (False, True):
        content = {path: path.read_bytes() for path in tmp_path.iterdir()}
        assert set(content) == (set(feature_files(output)) if before else set())
        with pytest.raises(KeyboardInterrupt), open_features(output, INFO) as writer:
            writer.write(ROWS[0])
            raise KeyboardInterrupt
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == content
        write(output, ROWS)
    assert all(is_features(path) for path in feature_files(output))
    for mine in (b"", b"{}", b"PAR1 of my own", b"\x93NUMPY of my own"):
        (tmp_path / "mine.npy").write_bytes(mine)
        assert not is_features(tmp_path / "mine.npy")
