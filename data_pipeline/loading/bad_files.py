"""Faults of single files: the exception, the record, and the log that names each bad file once."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

log = logging.getLogger("data_pipeline")


@dataclass(frozen=True)
class Failure:
    """One file that was left out, and why.

    Args:
        path: the file, as text that can be printed.
        reason: one line.
    """

    path: str
    reason: str


class FaultLog:
    """Names every bad file once, however many epochs meet it, and counts them.

    It is the run's quarantine as well: a file in it is not read again, but fails for the same reason each
    time it comes round. Hand the same one to training and evaluation, so that neither repeats the other.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._quarantine: dict[os.PathLike[str], str] = {}

    def add(self, failure: Failure) -> None:
        """Record a failure, and warn if this file was not named before."""
        if failure.path not in self.reasons:
            self.reasons[failure.path] = failure.reason
            log.warning("left out %s: %s", failure.path, failure.reason)

    def exclude(self, path: os.PathLike[str], reason: str) -> None:
        """Put a file into quarantine, by its path: several paths may print alike."""
        self._quarantine.setdefault(path, reason)

    def reason_for(self, path: os.PathLike[str]) -> str | None:
        """Why a file is not to be read again; None for a file that may be."""
        return self._quarantine.get(path)

    def __len__(self) -> int:
        return len(self.reasons)
