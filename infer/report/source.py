"""The sources of a report: the files of a run and of its exports, as far as they exist."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.text import printable
from data_pipeline.results.class_report import (
    CSV_HEADS,
    ClassCounts,
    ClassReport,
    Mistake,
    make_class_report,
)
from infer.bundle.load import exports_of, is_bundle, load_bundle
from infer.bundle.manifest import Manifest, read_manifest
from train.runs.folder import MetricsRow, RunFolder

if TYPE_CHECKING:
    from train.checkpoints.load import Checkpoint

MAX_TABLE_BYTES = 1 << 26
"""A confusion matrix of 5,000 classes; a larger file is none of ours."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A run, or an export without its run.

    Attributes:
        name: of the folder.
        run: its folder; None for an export without one.
        bundle: the export that was named; None where a run was.
        manifests: of all exports, by the name of their folders.
        damaged: exports that cannot be read, with the reason.
        rows: of `metrics.jsonl`.
        config: the configuration as plain values; empty where it is gone.
        counts: of each pair of classes; None where the run's tables are not there.
        report: what the model gets wrong; None where nothing says so.
        report_step: of the validation that the report is of; None where it is another evaluation.
        checkpoint: the best one; None where there is none that can be used.
        no_checkpoint: why not.
    """

    name: str
    run: Path | None
    bundle: Path | None = None
    manifests: dict[str, Manifest] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    rows: tuple[MetricsRow, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    counts: ClassCounts | None = None
    report: ClassReport | None = None
    report_step: int | None = None
    checkpoint: Checkpoint | None = None
    no_checkpoint: str = ""

    @property
    def named_manifest(self) -> Manifest | None:
        """The manifest of the export that was named, else of the newest."""
        return self.manifests[self.export.name] if self.export is not None else None

    @property
    def export(self) -> Path | None:
        """The folder of the export that was named, else of the newest; None where there is none."""
        if self.bundle is not None or self.run is None or not self.manifests:
            return self.bundle
        return self.run / "export" / max(self.manifests, key=lambda name: self.manifests[name].created)

    @property
    def labels(self) -> dict[str, str]:
        """The names of the classes for people, by those that the data has."""
        labels, model = {}, self.checkpoint or self.named_manifest
        if model is not None:
            pairs = zip(model.classes, model.class_labels, strict=True)
            labels = {printable(name): printable(label) for name, label in pairs}
        if self.report is not None:
            labels |= {row.name: row.label for row in self.report.classes if row.name != row.label}
        return labels


def short_labels(names: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The first of several names of each class, "tabby" of "tabby, tabby cat"; and the class if it is shared.

    >>> short_labels(("n1", "n2", "n3"), ("crane", "crane, lifting device", "tabby, tabby cat"))
    ['crane (n1)', 'crane (n2)', 'tabby']
    """
    first = [label.split(",")[0].strip() or name for name, label in zip(names, labels, strict=True)]
    return [
        short if first.count(short) == 1 or short == name else f"{short} ({name})"
        for name, short in zip(names, first, strict=True)
    ]


def find_source(path: Path | None, runs: Path = Path("runs")) -> Source:
    """Read what there is of a run or an export. Images and weights are not read, but for an export's hash.

    Args:
        path: a run's folder, an export's or a file in it; an export in a run stands for the run. None for
            the newest run.
        runs: folder of the runs.
    Raises:
        UserError: there is neither.
        CorruptFileError: the export that is named is not what was exported.
    """
    if path is None:
        started = list(runs.glob("*/metrics.jsonl"))
        if not started:
            raise UserError(f"no run with results under {runs}/: train first, or name a run or an export")
        path = max(started, key=lambda file: (file.stat().st_mtime_ns, file)).parent
    if is_bundle(path):
        folder = load_bundle(path).folder.resolve()
        run = folder.parent.parent
        if folder.parent.name == "export" and (run / "config.json").is_file():
            return _read_run(run, folder)
        return Source(
            name=folder.name,
            run=None,
            bundle=folder,
            manifests={folder.name: read_manifest(folder)},
            no_checkpoint="this export does not lie in its run, which has the checkpoint",
        )
    if not (path / "config.json").is_file():
        what = "is neither a run nor an export" if path.exists() else "does not exist"
        raise UserError(f"{printable(path)} {what}: name a run's folder, or one that `alexnet export` wrote")
    return _read_run(path.resolve(), None)


def _read_run(run: Path, bundle: Path | None) -> Source:
    manifests, damaged = {}, {}
    for folder in exports_of(run):
        try:
            manifests[folder.name] = read_manifest(folder)
        except (UserError, CorruptFileError) as error:
            damaged[folder.name] = str(error).replace(f"{run}/", "")
    rows = tuple(RunFolder(run).rows())
    try:
        config = msgspec.json.decode((run / "config.json").read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{printable(run / 'config.json')} cannot be read: {error}") from error
    reported = ((row.report, row.step) for row in reversed(rows) if isinstance(row.report, ClassReport))
    in_row, report_step = next(reported, (None, None))
    counts, in_tables = _read_tables(run)
    same = in_row is not None and (in_tables is None or in_tables.classes == in_row.classes)
    checkpoint, no_checkpoint = _load_best(run)
    return Source(
        name=run.name,
        run=run,
        bundle=bundle,
        manifests=manifests,
        damaged=damaged,
        rows=rows,
        config=config,
        counts=counts,
        report=in_row if same else in_tables,
        report_step=report_step if same else None,
        checkpoint=checkpoint,
        no_checkpoint=no_checkpoint,
    )


def _load_best(run: Path) -> tuple[Checkpoint | None, str]:
    try:
        from train.checkpoints.load import find_checkpoint, load_checkpoint

        return load_checkpoint(find_checkpoint(run)), ""
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed here: pip install 'alexnet[train]'"
    except (UserError, CorruptFileError) as error:
        return None, f"there is no checkpoint that can be used: {str(error).replace(str(run), run.name)}"


def _read_tables(run: Path) -> tuple[ClassCounts | None, ClassReport | None]:
    """Read the tables that training, or `alexnet evaluate --csv`, left in a run; None if one is not ours."""
    try:
        classes, confusion, mistakes = (_read_csv(run / name) for name in CSV_HEADS)
        names = confusion[0][1:]
        matrix = np.array([[int(cell) for cell in row[1:]] for row in confusion[1:]], dtype=np.int64)
        if matrix.shape != (len(names), len(names)) or [row[0] for row in confusion[1:]] != names:
            return None, None
        by_field = [dict(zip(classes[0], row, strict=True)) for row in classes[1 : 1 + len(names)]]
        samples = [int(row["num_samples"]) for row in by_field]
        # Counts again, exactly: a fraction was one division of them.
        shares = [float(row["top5"] or 0) for row in by_field]
        top5 = np.array([round(share * n) for share, n in zip(shares, samples, strict=True)], dtype=np.int64)
        counts = ClassCounts(matrix, top5)
        found = [
            Mistake(path=m[0], truth=m[1], predicted=m[2], probability=float(m[3])) for m in mistakes[1:]
        ]
        return counts, make_class_report(counts, names, [row["label"] for row in by_field], found)
    except (OSError, ValueError, LookupError, csv.Error):
        return None, None


def _read_csv(path: Path) -> list[list[str]]:
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise ValueError(f"{path} is larger than any table of ours")
    return list(csv.reader(io.StringIO(path.read_text(encoding="utf-8"))))
