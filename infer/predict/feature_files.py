"""Files of features: Parquet, or `.npy` with two files beside it. Written as a stream, whole or not at all.

F.parquet          path, status, error and features of each input; its metadata hold a `FeatureInfo`
F.npy              float32 (inputs, length); a row of NaN for what could not be read
F.npy.json         the `FeatureInfo`
F.npy.rows.jsonl   path and status of each row, and the reason of each error
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np

from data_pipeline.common.files import read_head
from infer.bundle.load import Bundle
from infer.bundle.manifest import read_digest
from infer.bundle.schema import FeatureLayer, Sha256
from infer.predict.rows import CompletedRow, ErrorRow, FeatureRow, Row
from infer.predict.writers import RowWriter, import_parquet, journal_of, name_unwritable, parquet_footer

METADATA_KEY = b"alexnet_features"
FEATURE_SUFFIXES = (".parquet", ".npy")
BLOCK_BYTES = 1 << 23
"""Features that are kept until they become a row group of Parquet, and that are read at a time."""

_NPY = b"\x93NUMPY"
_HEAD_BYTES = 1 << 16


class FeatureInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Description of the features in a file.

    Attributes:
        bundle_sha256: digest of the bundle's manifest, which `bundle.json` and `alexnet doctor` show.
        network: name of the network.
        layer: of the network.
        num_features: of each image.
        ten_crop: whether they are the mean of the paper's ten views.
    """

    bundle_sha256: Sha256
    network: str
    layer: FeatureLayer
    num_features: Annotated[int, msgspec.Meta(ge=1)]
    ten_crop: bool = False


def info_of(bundle: Bundle, *, ten_crop: bool) -> FeatureInfo:
    """Describe the features of a bundle that gives some."""
    manifest = bundle.manifest
    assert manifest.feature_layer is not None
    return FeatureInfo(
        bundle_sha256=read_digest(bundle.folder),
        network=manifest.checkpoint.model,
        layer=manifest.feature_layer,
        num_features=manifest.num_features,
        ten_crop=ten_crop,
    )


def block_rows(num_features: int) -> int:
    """Rows of so many features that are kept in memory at a time."""
    return max(1, BLOCK_BYTES // (4 * num_features))


def info_path(output: Path) -> Path:
    """The file beside a `.npy` file that says what it holds."""
    return output.with_name(output.name + ".json")


def feature_files(output: Path) -> tuple[Path, ...]:
    """The file of features, and those beside it."""
    beside = (info_path(output), journal_of(output)) if output.suffix.lower() == ".npy" else ()
    return (output, *beside)


def is_features(path: Path) -> bool:
    """Whether a file is one that `open_features` wrote."""
    head = read_head(path, _HEAD_BYTES)
    if head.startswith(b"PAR1"):
        return METADATA_KEY in parquet_footer(path)
    if head.startswith(_NPY):
        return is_features(info_path(path))
    try:
        if path.name.endswith(".rows.jsonl"):
            msgspec.json.decode(head.partition(b"\n")[0], type=CompletedRow)
        else:
            msgspec.json.decode(head, type=FeatureInfo)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


@contextmanager
def open_features(output: Path, info: FeatureInfo) -> Iterator[RowWriter]:
    """A writer of the features of rows; the files are there once all rows are, and not after an error.

    Args:
        output: the file; its suffix is one of `FEATURE_SUFFIXES`.
        info: what it holds.
    Raises:
        UserError: it cannot be written, or Parquet without pyarrow.
    """
    files = feature_files(output)
    partial = [file.with_name(f".{file.name}.partial") for file in files]
    try:
        with ExitStack() as stack:
            with name_unwritable(output):
                streams = [stack.enter_context(file.open("wb")) for file in partial]
            is_npy = len(streams) > 1
            writer = _NpyWriter(info, *streams) if is_npy else _ParquetWriter(info, streams[0], stack)
            yield writer
            writer.finish()
        if len(files) > 1:
            output.unlink(missing_ok=True)  # old features beside new paths would be a mixture
        for temporary, file in reversed(list(zip(partial, files, strict=True))):
            temporary.replace(file)
    finally:
        for temporary in partial:
            temporary.unlink(missing_ok=True)


class _ParquetWriter:
    def __init__(self, info: FeatureInfo, stream: BinaryIO, open_files: ExitStack) -> None:
        self._pa, pq = import_parquet()
        columns = [(name, self._pa.string()) for name in ("path", "status", "error")]
        self._schema = self._pa.schema(
            [*columns, ("features", self._pa.list_(self._pa.float32()))],
            metadata={METADATA_KEY: msgspec.json.encode(info)},
        )
        # Features hardly repeat: a dictionary of them would take longer, and no less room.
        writer = pq.ParquetWriter(stream, self._schema, use_dictionary=["status"])
        self._writer = open_files.enter_context(writer)
        self._rows: list[Row] = []
        self._most = block_rows(info.num_features)

    def write(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) == self._most:
            self.finish()

    def finish(self) -> None:
        """Write the rows that are kept as a row group."""
        rows, self._rows = self._rows, []
        columns: dict[str, list[Any]] = {
            "path": [row.path for row in rows],
            "status": [row.status for row in rows],
            "error": [row.error if isinstance(row, ErrorRow) else None for row in rows],
            "features": [row.features if isinstance(row, FeatureRow) else None for row in rows],
        }
        if rows:
            self._writer.write_table(self._pa.table(columns, self._schema))


class _NpyWriter:
    def __init__(self, info: FeatureInfo, npy: BinaryIO, about: BinaryIO, rows: BinaryIO) -> None:
        self._npy, self._about, self._rows, self._info = npy, about, rows, info
        self._count = 0
        npy.write(self._header())
        self._unreadable = np.full(info.num_features, np.nan, np.float32).tobytes()

    def _header(self) -> bytes:
        # NumPy leaves room for the digits of a larger first axis, so that its length stays the same.
        text = io.BytesIO()
        shape = (self._count, self._info.num_features)
        np.lib.format.write_array_header_1_0(text, {"descr": "<f4", "fortran_order": False, "shape": shape})
        return text.getvalue()

    def write(self, row: Row) -> None:
        self._count += 1
        line = row if isinstance(row, ErrorRow) else {"path": row.path, "status": row.status}
        self._rows.write(msgspec.json.encode(line) + b"\n")
        if isinstance(row, FeatureRow):
            self._npy.write(row.features.astype("<f4", copy=False).tobytes())
        else:
            self._npy.write(self._unreadable)

    def finish(self) -> None:
        """Write the number of rows, and what they are."""
        header = self._header()
        size = len(header) + self._count * len(self._unreadable)
        assert self._npy.tell() == size, (self._npy.tell(), size)
        self._npy.seek(0)
        self._npy.write(header)
        self._about.write(msgspec.json.format(msgspec.json.encode(self._info)) + b"\n")
