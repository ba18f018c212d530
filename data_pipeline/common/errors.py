"""The errors that a user can act on. Each carries the exit code of the command line."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_SOME_UNREADABLE = 3
"""Exit code of a command that finished, but could not read some of its inputs. No exception raises it."""


class UserError(ValueError):
    """Wrong use: a bad option, a missing folder, a checkpoint of another model. One line, with what to do."""

    exit_code = 2


class CorruptFileError(RuntimeError):
    """A damaged or changed file of ours: its hash, size or structure is not the one that was written."""

    exit_code = 1


class SaveError(RuntimeError):
    """A result could not be written: a full disk, most often. An earlier version of it is untouched."""

    exit_code = 1


class WorkerError(RuntimeError):
    """A worker process ended before its work did."""

    exit_code = 1


class InterruptedRunError(RuntimeError):
    """A signal stopped training, and the state is saved: `--resume auto` resumes it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class StoppedError(RuntimeError):
    """Ctrl-C stopped a command whose work is kept. The message says how to go on after it."""

    exit_code = 130  # as a shell says of what SIGINT ended


class RankLostError(RuntimeError):
    """Another rank did not join a collective: it died, or hangs. `--max-restarts` restarts all ranks."""

    exit_code = 1


class DivergedError(RuntimeError):
    """Training has diverged: the loss is not a number any more, or does not move."""

    exit_code = 1


class GateError(RuntimeError):
    """An exported model does not agree with its checkpoint, and is therefore not shipped."""

    exit_code = 4


@contextmanager
def name_continuation(how: str) -> Iterator[None]:
    """Turn Ctrl-C into a line that says how to go on.

    Args:
        how: what to do, for the message.
    Raises:
        StoppedError: Ctrl-C came.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise StoppedError(f"stopped; {how}") from error


@contextmanager
def raising(kind: type[Exception], what: str) -> Iterator[None]:
    """Turn an error of the system into one line of ours.

    Args:
        kind: the error to raise in its place.
        what: could not be done; the system's reason follows.

    >>> with raising(SaveError, "a.txt could not be written"):
    ...     raise OSError(errno.ENOSPC, "No space left on device")
    Traceback (most recent call last):
    data_pipeline.common.errors.SaveError: a.txt could not be written: No space left on device
    """
    try:
        yield
    except OSError as error:
        raise kind(f"{what}: {error.strerror or error}") from error


class ImageError(Exception):
    """One file cannot be decoded. The message is the reason, without the file's name."""


FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""Errors of a place that could be written to, and did not take all."""

_ADVICE = {
    **dict.fromkeys(FULL, "make room there, or name another place"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions, or name another place"),
    **dict.fromkeys((errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST), "name another place"),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "name another place"),
    errno.ENOENT: "is the name right?",
}


def line_of(error: Exception) -> tuple[str, int] | None:
    """The line and the exit code with which a command ends; None for an error that nobody foresaw.

    The line of a system's error says where and what to do.

    >>> line_of(PermissionError(errno.EACCES, "Permission denied", "/data/x"))
    ('/data/x: Permission denied; change its permissions, or name another place', 1)
    """
    from data_pipeline.common.text import printable  # which raises these errors itself

    code = getattr(error, "exit_code", None)
    if code is not None:
        return str(error), code
    if not isinstance(error, OSError) or error.errno not in _ADVICE:
        return None
    name = error.filename if error.filename2 is None else error.filename2
    where = f"{printable(os.fsdecode(name))}: " if isinstance(name, str | bytes) else ""
    return f"{where}{error.strerror}; {_ADVICE[error.errno]}", 1
