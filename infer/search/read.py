"""Read a file of features in blocks, so that a million rows need no more memory than a few."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable
from infer.predict.feature_files import METADATA_KEY, FeatureInfo, block_rows, info_path
from infer.predict.rows import CompletedRow
from infer.predict.writers import import_parquet, journal_of

# Shapes: N rows of a block, D features.

_DAMAGE: tuple[type[Exception], ...] = (OSError, ValueError, EOFError, LookupError, TypeError)
"""Exceptions raised when a damaged file is read; msgspec's errors are ValueErrors."""


class Block(NamedTuple):
    """Rows of a file: the number of the first, and their features (N, D); NaN for what could not be read."""

    first: int
    features: NDArray[np.float32]


def open_feature_file(path: Path) -> ParquetFeatures | NpyFeatures:
    """Open a file that `alexnet predict --features` wrote.

    Returns:
        The file: `info` says what it holds, `blocks` gives all rows, in order, a few megabytes at a time, and
        `paths_of` the paths of some rows, by number.
    Raises:
        UserError: there is none, it is damaged or something else, or Parquet without pyarrow. What lies
            behind the header is read, and may raise the same, later.
    """
    if not path.is_file():
        raise UserError(f"--in {printable(path)}: there is no such file")
    return NpyFeatures(path) if path.suffix.lower() == ".npy" else ParquetFeatures(path)


@contextmanager
def _name_damage(path: Path, *kinds: type[Exception]) -> Iterator[None]:
    try:
        yield
    except (*_DAMAGE, *kinds) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--in {printable(path)} is no whole file of `alexnet predict --features`: {reason}"
        ) from error


class ParquetFeatures:
    """A Parquet file of features that was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        pa, self._pq = import_parquet()
        self._kinds = (pa.ArrowException,)
        with _name_damage(path, *self._kinds), self._pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            self.info = msgspec.json.decode((schema.metadata or {})[METADATA_KEY], type=FeatureInfo)
            found = [(name, schema.field(name).type) for name in ("path", "features")]
            if found != [("path", pa.string()), ("features", pa.list_(pa.float32()))]:
                raise ValueError(f"columns {found}")

    def blocks(self) -> Iterator[Block]:
        first = 0
        for batch in self._batches("features"):
            block_ND = np.full((len(batch), self.info.num_features), np.nan, np.float32)
            column = batch.column("features")
            there_N = column.is_valid().to_numpy(zero_copy_only=False)
            with _name_damage(self._path):
                block_ND[there_N] = column.flatten().to_numpy().reshape(-1, self.info.num_features)
            yield Block(first, block_ND)
            first += len(block_ND)

    def paths_of(self, rows: Collection[int]) -> dict[int, str]:
        found, first = {}, 0
        for batch in self._batches("path"):
            column = batch.column("path")
            here = [row for row in rows if first <= row < first + len(column)]
            found.update({row: str(column[row - first].as_py()) for row in here})
            first += len(column)
        return found

    def _batches(self, column: str) -> Iterator[Any]:
        size = block_rows(self.info.num_features)
        with _name_damage(self._path, *self._kinds), self._pq.ParquetFile(self._path) as file:
            yield from file.iter_batches(size, columns=[column], use_threads=False)


class NpyFeatures:
    """A `.npy` file of features that was opened, and the files beside it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _name_damage(info_path(path)):
            self.info = msgspec.json.decode(info_path(path).read_bytes(), type=FeatureInfo)
        with _name_damage(path):
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
            wrong = rows.dtype != np.float32 or rows.shape[1:] != (self.info.num_features,)
            if wrong or not rows.flags.c_contiguous:
                raise ValueError(f"{rows.dtype} of shape {rows.shape}")
            self._count, self._offset = len(rows), rows.offset

    def blocks(self) -> Iterator[Block]:
        size = block_rows(self.info.num_features)
        with _name_damage(self._path), self._path.open("rb") as file:
            file.seek(self._offset)  # read, since what is mapped of a file stays in memory
            for first in range(0, self._count, size):
                block_ND = np.empty((min(size, self._count - first), self.info.num_features), np.float32)
                if file.readinto(block_ND.data) != block_ND.nbytes:
                    raise ValueError("it was cut off meanwhile")
                yield Block(first, block_ND)

    def paths_of(self, rows: Collection[int]) -> dict[int, str]:
        path, found = journal_of(self._path), {}
        with _name_damage(path), path.open("rb") as lines:
            for number, line in enumerate(itertools.islice(lines, max(rows, default=-1) + 1)):
                if number in rows:
                    found[number] = msgspec.json.decode(line, type=CompletedRow).path
            if missing := set(rows) - found.keys():
                raise ValueError(f"it has no row {min(missing)}")
        return found
