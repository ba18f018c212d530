"""Formats the output of `alexnet data verify` and `alexnet data info`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from data_pipeline.common.passed_over import PassedOver
from data_pipeline.common.text import printable, visible
from data_pipeline.inspect.pixel_stats import PixelStatistics
from data_pipeline.inspect.stats import ClassInfo, Info, SplitInfo, Spread
from data_pipeline.inspect.verify import SplitReport, VerifyReport

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 20
"""Bad files of a split, and repaired ones, that the terminal shows; the exclude list has all of them."""


def verify_as_json(report: VerifyReport) -> str:
    r"""Format one JSON object. Names that are not UTF-8 have `\xNN` for their odd bytes."""
    return json.dumps(
        {
            "clean": report.is_clean,
            "splits": {split.split: _split(split) for split in report.splits},
            "quarantine": None if report.quarantine is None else printable(report.quarantine),
            "unsaved": report.unsaved or None,
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
        "passed_over": split.passed_over.by_count,
        "num_loose": split.passed_over.num_loose,
    }


def verify_as_text(report: VerifyReport) -> str:
    """Format a line for each split, the first bad files, and the changes of the exclude list."""
    lines: list[str] = []
    for split in report.splits:
        good = split.num_samples - len(split.bad)
        hashed = f"; {split.num_shards_hashed} shards compared with their hashes" * bool(
            split.num_shards_hashed
        )
        lines.append(f"{split.split}: {good} of {split.num_samples} images can be decoded{hashed}")
        lines += [f"  damaged shard {printable(path)}" for path in split.damaged_shards]
        lines += _some([f"  {printable(path)}: {reason}" for path, reason in split.bad])
        if split.passed_over:
            lines.append(f"  passed over: {split.passed_over.sentence()}")
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


def print_info(info: Info, console: Console) -> None:
    """Print the splits, the classes and the pixels, with the recipe keys that follow from the pixels."""
    from rich.table import Table
    from rich.text import Text

    def text(value: object) -> Text:
        return Text(visible(str(value)))

    console.print(text(f"{info.root}: {len(info.classes)} classes, stored as {info.stored}"), soft_wrap=True)
    table = Table(show_header=True, box=None, pad_edge=False)
    for heading in ("", *info.splits):
        table.add_column(text(heading), justify="right" if heading else "left")
    rows = {split: _split_rows(found) for split, found in info.splits.items()}
    for name in next(iter(rows.values())):
        table.add_row(text(name), *(text(rows[split][name]) for split in info.splits))
    console.print(table)
    for split in info.splits:
        console.print(text(f"{split}: {_extreme_classes(info.classes, split)}"), soft_wrap=True)
        passed_over = PassedOver(info.splits[split].passed_over, info.splits[split].num_loose)
        if passed_over:
            console.print(text(f"{split}: passed over {passed_over.sentence()}"), soft_wrap=True)
    if info.pixels is not None:
        sampled = ", a sample" if info.splits["train"].sampled else ""
        console.print(
            text(
                f"pixels of train, in units of 0..1 ({info.pixels.num_images} images{sampled}, "
                f"{info.pixels.num_pixels} pixels):"
            ),
            soft_wrap=True,
        )
        for line in recipe_lines(info.pixels):
            console.print(text(f"  {line}"), soft_wrap=True)


def recipe_lines(pixels: PixelStatistics) -> list[str]:
    """Format the statistics as keys of a recipe, for the normalisation and the paper's colour noise."""

    def numbers(values: tuple[float, ...], digits: int) -> str:
        return f"[{', '.join(f'{value:.{digits}f}' for value in values)}]"

    vectors = ", ".join(numbers(vector, 4) for vector in pixels.eigenvectors)
    return [
        f"preprocessing.mean = {numbers(pixels.mean, 4)}",
        f"preprocessing.std = {numbers(pixels.std, 4)}",
        f"augment.pca_eigenvalues = {numbers(pixels.eigenvalues, 6)}",
        f"augment.pca_eigenvectors = [{vectors}]",
    ]


def _split_rows(split: SplitInfo) -> dict[str, str]:
    from rich.filesize import decimal

    most = split.per_class
    common = ", ".join(f"{w} x {h} ({n})" for w, h, n in split.common_sizes[:3])
    examined = f"{split.num_examined}{' (a sample)' if split.sampled else ''}"
    return {
        "images": str(split.num_samples),
        "in quarantine": str(split.num_quarantined),
        "images of a class": f"{most.min} to {most.max}, mean {most.mean:.1f}",
        "classes without images": str(split.num_empty_classes),
        "size": decimal(split.size_bytes),
        "examined": examined,
        "unreadable": str(split.num_unreadable),
        "formats": ", ".join(f"{name} {count}" for name, count in split.formats.items()) or "none",
        "width": _spread(split.width),
        "height": _spread(split.height),
        "most frequent sizes": f"{common}; {split.num_sizes} in all" if common else "none",
    }


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "none"
    if spread.min == spread.max:
        return f"{spread.min}"
    return f"{spread.min} to {spread.max}, median {spread.median}, 90% in {spread.p5}..{spread.p95}"


def _extreme_classes(classes: tuple[ClassInfo, ...], split: str) -> str:
    """Name the class with the fewest images and the one with the most; on a tie, the first."""
    fewest = min(classes, key=lambda c: c.counts[split])
    most = max(classes, key=lambda c: c.counts[split])
    if fewest.counts[split] == most.counts[split]:
        return f"every class has {most.counts[split]} images"
    return (
        f"fewest images: {_named(fewest)} ({fewest.counts[split]}); "
        f"most: {_named(most)} ({most.counts[split]})"
    )


def _named(found: ClassInfo) -> str:
    return found.label if found.label == found.name else f"{found.label} [{found.name}]"
