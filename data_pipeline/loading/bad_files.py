"""Records files that cannot be read or decoded, and logs each of them once."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

log = logging.getLogger("data_pipeline")


@dataclass(frozen=True)
class Failure:
    """One file that was left out, with the reason.

    Attributes:
        path: the file, as text that can be printed.
        reason: one line.
    """

    path: str
    reason: str


class FaultLog:
    """Logs every bad file once, in however many epochs it occurs, and counts them.

    It is the run's exclude list as well: a file in it is not read again, but fails for the same reason in
    each epoch. Training and evaluation share one, so that neither logs what the other has logged.
    """

    def __init__(self) -> None:
        self._reasons: dict[os.PathLike[str], str] = {}

    def add(self, failure: Failure, path: os.PathLike[str]) -> None:
        """Record a failure, log it if it is the file's first, and exclude the file.

        Args:
            failure: what was left out, and why.
            path: the file to exclude, by its path rather than its printed name, which two files may share.
        """
        if path not in self._reasons:
            self._reasons[path] = failure.reason
            log.warning("left out %s: %s", failure.path, failure.reason)

    def reason_for(self, path: os.PathLike[str]) -> str | None:
        """The reason why a file is excluded; None for a file that may be read."""
        return self._reasons.get(path)

    def __len__(self) -> int:
        return len(self._reasons)
