"""Rows and scalars survive a full disk: what does not fit is kept, and nothing is half written."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.common.errors import SaveError
from data_pipeline.common.files import RetryingAppendFile
from tests.helpers.checkpoint_samples import row
from train.config.load import make_config
from train.runs.folder import create_run
from train.runs.metrics_log import TensorBoardWriter


@contextmanager
def room_for(size_bytes: int) -> Iterator[None]:
    """No file may grow beyond a size: a write is cut short there, or fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_pieces_without_room_are_kept_and_written_first_later(tmp_path: Path) -> None:
    file = RetryingAppendFile(tmp_path / "new" / "rows")
    assert file.append(b"first\n") is None
    with room_for(10):
        error = file.append(b"second\n")  # four bytes of it would fit
        assert isinstance(error, OSError) and error.filename == str(tmp_path / "new" / "rows")
        assert file.path.read_bytes() == b"first\n", "half a piece is left"
        assert isinstance(file.append(b"third\n"), OSError)
        with pytest.raises(OSError, match="too large"):
            file.sync()
    file.sync()
    assert file.path.read_bytes() == b"first\nsecond\nthird\n"
    assert file.append(b"fourth\n") is None
    assert file.path.read_bytes().endswith(b"third\nfourth\n")


def test_append_file_error_names_the_full_device() -> None:
    error = RetryingAppendFile(Path("/dev/full")).append(b"x")
    assert isinstance(error, OSError)
    assert (error.strerror, error.filename) == ("No space left on device", "/dev/full")


def test_metrics_rows_wait_for_room_before_a_checkpoint(tmp_path: Path) -> None:
    folder = create_run(tmp_path, make_config("demo"))
    assert folder.append(row(1)) is None
    with room_for(folder.metrics.stat().st_size + 5):
        assert isinstance(folder.append(row(2)), OSError)
        with pytest.raises(SaveError, match=r"the rows of .*metrics\.jsonl could not be written: File too"):
            folder.sync_rows()
    folder.sync_rows()
    assert [r.step for r in folder.rows()] == [1, 2]


def test_tensorboard_resume_purges_later_steps(tmp_path: Path) -> None:
    board = TensorBoardWriter(tmp_path, purge_step=1)
    for step in (1, 2, 3):
        assert board.add({"train/loss": float(step)}, step) is None
    later = TensorBoardWriter(tmp_path / "later", purge_step=3)
    later.add({"train/loss": 30.0}, 3)
    later.file.path.rename(tmp_path / f"{board.file.path.name}.later")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = events.Scalars("train/loss")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(1, 1.0), (2, 2.0), (3, 30.0)]
