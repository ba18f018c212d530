"""The sections of facts: the summary, the configuration, where everything comes from, and speed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from data_pipeline.common.errors import UserError
from data_pipeline.common.machine import installed_version
from infer.bundle.describe import gate_lines
from infer.bundle.manifest import Manifest
from infer.report.curves import NO_ROWS
from infer.report.page import facts, note, percent, table, text
from infer.report.source import Source
from train.config.load import make_config, recipe_names
from train.config.schema import RunConfig


def make_summary(source: Source) -> str:
    """Say in a few rows what was trained on what, and how good it is."""
    manifest, checkpoint, model = source.named_manifest, source.checkpoint, source.config.get("model", {})
    rows: list[tuple[str, object]] = []
    if checkpoint is not None:
        rows.append(
            ("network", f"{checkpoint.config.model.description}, {len(checkpoint.classes):,} classes")
        )
        from train.runs.card import count_parameters  # needs torch, as the checkpoint does

        rows.append(("parameters", f"{count_parameters(checkpoint):,}"))
    elif manifest is not None:
        rows.append(("network", f"{manifest.checkpoint.model}, {len(manifest.classes):,} classes"))
    elif model:
        rows.append(("network", model.get("name", "")))
    recipe = source.config.get("recipe") or (manifest.checkpoint.recipe if manifest else "")
    rows.append(("recipe", recipe))
    if checkpoint is not None and checkpoint.data:
        rows.append(("data", _data_words(source)))
    elif manifest is not None and manifest.report is not None:
        rows.append(("data", f"{manifest.report.data}, {manifest.report.num_available:,} validation images"))
    validations = [row for row in source.rows if row.split == "val" and row.top1 is not None]
    if validations:
        best, last = max(validations, key=lambda row: row.top1 or 0), validations[-1]
        rows.append(("best validation", _result(best.top1, best.top5, best.samples, best.epoch)))
        if best is not last:
            rows.append(("last validation", _result(last.top1, last.top5, last.samples, last.epoch)))
        rows.append(("epochs", f"{last.epoch} of {source.config.get('epochs', '?')}"))
    elif manifest is not None and (metrics := manifest.checkpoint.metrics):
        found = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        rows.append(("validation, by the export", f"{found} (epoch {manifest.checkpoint.epoch})"))
    if source.damaged:
        rows += [(f"export {name}", f"cannot be read: {why}") for name, why in source.damaged.items()]
    return facts(rows)


def _result(top1: float | None, top5: float | None, samples: int, epoch: int) -> str:
    return f"top-1 {percent(top1)}, top-5 {percent(top5)} of {samples:,} images, epoch {epoch}"


def _data_words(source: Source) -> str:
    assert source.checkpoint is not None
    root = str(source.checkpoint.config.data.root or "")
    name = root.rstrip("/").rpartition("/")[2]
    counts = ", ".join(
        f"{split} {found.num_samples:,} images" for split, found in source.checkpoint.data.items()
    )
    return f"{name}: {counts}"


def make_configuration(source: Source) -> str:
    """Show where the configuration differs from the recipe's, and all of it."""
    if not source.config:
        return note("This export does not lie in its run, which has the configuration.")
    config = dict(flat(source.config))
    name, base = _base_of(source.config)
    changed = [
        (where, without_folders(base.get(where)), without_folders(value))
        for where, value in config.items()
        if where != "recipe" and value != base.get(where)
    ]
    body = f"<p>{'Differences from' if changed else 'No difference from'} {text(name)}.</p>"
    if changed:
        body += table(("key", "there", "in this run"), changed)
    changes = source.checkpoint.progress.changes if source.checkpoint is not None else ()
    if changes:
        rows = [(change.step, "; ".join(change.what)) for change in changes]
        body += f"<h3>Changed while it ran</h3>{table(('after step', 'what'), rows)}"
    lines = "\n".join(text(f"{where} = {without_folders(value)}") for where, value in config.items())
    return f"{body}<details><summary>All {len(config)} keys</summary><pre>{lines}</pre></details>"


def _base_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The configuration to compare with, and what it is: the recipe's own, else the defaults of all keys."""
    recipe = str(config.get("recipe"))
    why = "does not ship with alexnet"
    if recipe in recipe_names():
        try:
            values = msgspec.to_builtins(make_config(recipe))
            return f"recipe {recipe}, as it ships with this version", dict(flat(values))
        except UserError as error:
            why = f"cannot be read: {error}"
    defaults = dict(flat(msgspec.to_builtins(RunConfig())))
    return f"the defaults of all keys (recipe {recipe} {why})", defaults


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested tables as dotted keys.

    >>> dict(flat({"epochs": 8, "model": {"name": "paper"}}))
    {'epochs': 8, 'model.name': 'paper'}
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", list(value) if isinstance(value, tuple) else value


def without_folders(value: Any) -> str:
    """A value of the configuration as text, without the folders of this machine.

    >>> without_folders("/home/ann/data/birds"), without_folders(0.1), without_folders("data/birds")
    ('…/birds', '0.1', 'data/birds')
    """
    if isinstance(value, str):
        inside = value.startswith(("/", "~", "..")) or ":\\" in value
        return f"…/{value.replace(chr(92), '/').rstrip('/').rpartition('/')[2]}" if inside else value
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def make_provenance(source: Source) -> str:
    """Say which files these are, by their hashes, and which programs made them."""
    rows: list[tuple[str, object]] = [("run" if source.run is not None else "export", source.name)]
    if (found := source.checkpoint) is not None:
        rows += [
            ("checkpoint", f"step {found.step:,}, epoch {found.epoch}, {found.samples_seen:,} images seen"),
            ("its weights", "the average over training" if found.average_state else "of the last step"),
            ("SHA-256 of its state.pt", found.sha256),
        ]
        for split, data in found.data.items():
            excluded = f", {data.num_quarantined:,} more excluded" if data.num_quarantined else ""
            rows.append((f"data, {split}", f"{data.num_samples:,} images{excluded}; SHA-256 {data.sha256}"))
    elif source.run is not None:
        rows.append(("checkpoint", source.no_checkpoint))
    for name, manifest in source.manifests.items():
        made = manifest.checkpoint
        rows.append((f"export {name}", f"{manifest.created.partition('.')[0]} UTC, from step {made.step:,}"))
        rows.append(("SHA-256 of its checkpoint", made.sha256))
        versions = ", ".join(f"{library} {version}" for library, version in manifest.versions.items())
        rows.append(("made with", versions or "not recorded"))
    version = installed_version("alexnet") or "of unknown version (not installed)"
    rows.append(("this report", f"alexnet {version}"))
    return facts(rows)


def make_speed(source: Source) -> str:
    """Say how fast the run was, and how far its exports agree with it."""
    rows: list[tuple[str, object]] = []
    for split, words in (("train", "training"), ("val", "validation")):
        if speeds := [row.images_per_s for row in source.rows if row.split == split]:
            rows.append(
                (f"{words}, median of {len(speeds)} rows", f"{statistics.median(speeds):,.0f} images/s")
            )
    if len(source.rows) > 1:
        hours, seconds = divmod(round(source.rows[-1].time - source.rows[0].time), 3600)
        spent = f"{hours} h {seconds // 60} min" if hours else f"{seconds // 60} min {seconds % 60} s"
        rows.append(("from the first row to the last", f"{spent}, with any time that the run was stopped"))
    body = facts(rows) if rows else note(NO_ROWS)
    exports = "".join(_describe_export(name, manifest) for name, manifest in source.manifests.items())
    if not exports:
        exports = note("There is no export: `alexnet export` makes one.")
    return f"{body}<h3>Exports</h3>{exports}"


def _describe_export(name: str, manifest: Manifest) -> str:
    files = ", ".join(f"{file} {entry.size_bytes / 1e6:.1f} MB" for file, entry in manifest.files.items())
    assert manifest.report is not None  # read_manifest says so
    lines = gate_lines(manifest.report, manifest.rebuild)
    gate = "\n".join(text(line) for line in lines)
    return f"<p><b>{text(name)}</b>: {text(manifest.precision)}; {text(files)}</p><pre>{gate}</pre>"
