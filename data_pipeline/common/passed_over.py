"""Counts the files of a split that are not read, by suffix, so that none is missing without a word."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import msgspec

from data_pipeline.common.text import printable

log = logging.getLogger("data_pipeline")

OTHERS = "others"
_MAX_SUFFIXES, _MAX_CHARS = 32, 16
_SHOWN = 5


class PassedOver(msgspec.Struct):
    """Counts of the files that a listing skipped, without hidden files and those of operating systems.

    Attributes:
        suffixes: number of files that are taken for no image, by lower-case suffix; "" for none, `OTHERS` for
            long ones and where there are too many.
        num_loose: images that lie beside the folders that are read.
    """

    suffixes: dict[str, int] = {}
    num_loose: int = 0

    def __bool__(self) -> bool:
        return bool(self.suffixes or self.num_loose)

    def add(self, name: str) -> None:
        """Count a file, by its name."""
        self._count(printable(os.path.splitext(name)[1].lower()), 1)  # noqa: PTH122 - half the cost

    def add_loose(self, name: str, is_image: bool) -> None:
        """Count a file that lies beside the folders that are read."""
        if is_image:
            self.num_loose += 1
        else:
            self.add(name)

    def merge(self, other: PassedOver) -> None:
        """Add the counts of another."""
        self.num_loose += other.num_loose
        for suffix, count in other.suffixes.items():
            self._count(suffix, count)

    def _count(self, suffix: str, count: int) -> None:
        full = len(self.suffixes) >= _MAX_SUFFIXES and suffix not in self.suffixes
        if full or len(suffix) > _MAX_CHARS:
            suffix = OTHERS
        self.suffixes[suffix] = self.suffixes.get(suffix, 0) + count

    @property
    def by_count(self) -> dict[str, int]:
        """The suffixes, the most frequent first."""
        return dict(sorted(self.suffixes.items(), key=lambda item: (-item[1], item[0])))

    def sentence(self) -> str:
        """The skipped files as a part of a line; empty if there are none.

        >>> PassedOver({".txt": 2, ".heic": 9, "": 1}, num_loose=3).sentence()
        '12 files that are no images (9 .heic, 2 .txt, 1 without suffix), 3 images beside the class folders'
        """
        parts = []
        if total := sum(self.suffixes.values()):
            parts.append(f"{_files(total)} ({_listed(self.by_count)})")
        if self.num_loose:
            parts.append(f"{self.num_loose} image{'s' * (self.num_loose > 1)} beside the class folders")
        return ", ".join(parts)


def log_passed_over(split: str, passed_over: PassedOver) -> None:
    """Log, in one line, what the listing of a split has passed over, if anything."""
    if passed_over:
        log.info("%s: passed over %s", split, passed_over.sentence())


def _files(total: int) -> str:
    return "1 file that is no image" if total == 1 else f"{total} files that are no images"


def _listed(counts: Mapping[str, int]) -> str:
    named = [(suffix, count) for suffix, count in counts.items() if suffix != OTHERS]
    shown = [f"{count} {suffix or 'without suffix'}" for suffix, count in named[:_SHOWN]]
    rest = counts.get(OTHERS, 0) + sum(count for _, count in named[_SHOWN:])
    return ", ".join([*shown, f"{rest} of other suffixes"] if rest else shown)
