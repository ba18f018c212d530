"""What `alexnet data verify` and `alexnet data info` print."""

from __future__ import annotations

import json

from data_pipeline.faults import printable, visible
from data_pipeline.verify import SplitReport, VerifyReport

_SHOWN = 20
"""Bad files of a split, and repaired ones, that are named on the terminal; the list has all of them."""


def verify_as_json(report: VerifyReport) -> str:
    r"""One JSON object. Names that are not UTF-8 have `\xNN` for their odd bytes; the list has the names."""
    return json.dumps(
        {
            "clean": report.is_clean,
            "splits": {split.split: _split(split) for split in report.splits},
            "quarantine": None if report.quarantine is None else printable(report.quarantine),
            "num_listed": report.num_listed,
            "num_added": report.num_added,
            "repaired": [{"path": printable(path), "reason": reason} for path, reason in report.repaired],
        }
    )


def _split(split: SplitReport) -> dict[str, object]:
    return {
        "num_samples": split.num_samples,
        "num_bad": len(split.bad),
        "bad": [{"path": printable(path), "reason": reason} for path, reason in split.bad],
        "num_shards_hashed": split.num_shards_hashed,
        "damaged_shards": [printable(path) for path in split.damaged_shards],
    }


def verify_as_text(report: VerifyReport) -> str:
    """A line for each split, the first bad files, and what became of the list."""
    lines: list[str] = []
    for split in report.splits:
        good = split.num_samples - len(split.bad)
        hashed = f"; {split.num_shards_hashed} shards held against their hashes" * bool(
            split.num_shards_hashed
        )
        lines.append(f"{split.split}: {good} of {split.num_samples} images can be decoded{hashed}")
        lines += [f"  damaged shard {printable(path)}" for path in split.damaged_shards]
        lines += _some([f"  {printable(path)}: {reason}" for path, reason in split.bad])
    if report.repaired:
        lines.append(f"no longer listed: {len(report.repaired)}")
        lines += _some([f"  {printable(path)} (was: {reason})" for path, reason in report.repaired])
    if report.quarantine is not None:
        lines.append(
            f"{printable(report.quarantine)} lists {report.num_listed} ({report.num_added} new): "
            "training leaves them out"
        )
    elif report.is_clean:
        lines.append("nothing is damaged: no quarantine list is needed")
    return "\n".join(visible(line) for line in lines)


def _some(lines: list[str]) -> list[str]:
    more = len(lines) - _SHOWN
    return [*lines[:_SHOWN], f"  … and {more} more"] if more > 0 else lines
