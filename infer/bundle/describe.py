"""Format a bundle for people: its files, its precision, the gate's report, and where its engine loads."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import astuple

from infer.bundle.gate_report import Agreement, GateReport, Limits, Rebuild
from infer.bundle.load import Bundle, names_beside
from infer.bundle.schema import CPU_NAME, ENGINE_NAME, ONNX_NAME

_COLUMNS = "    {:<14}  {:>8}  {:>8}  {:>4}  {:>8}  {:>8}  {:>8}"
_HEADER = ("", "top-1", "top-5", "ties", "largest", "mean", "accuracy")
# The fields of an `Agreement`, in their order.
_ROW = "    {:<14}  {:>8.2%}  {:>8.2%}  {:>4}  {:>8.1e}  {:>8.1e}  {:>8}"


def describe_export(bundle: Bundle) -> list[str]:
    """Format the lines that `alexnet export` prints for one bundle."""
    manifest = bundle.manifest
    files = ", ".join(f"{name} {entry.size_bytes / 1e6:.1f} MB" for name, entry in manifest.files.items())
    lines = [
        f"exported {bundle.folder}",
        f"  files: {files}",
        f"  beside them: {', '.join(names_beside(bundle.folder)) or 'no card, no weights'}",
        f"  {manifest.precision}, batches of 1 to {manifest.max_batch}, {len(manifest.classes)} classes",
    ]
    if manifest.feature_layer is not None:
        lines.append(f"  features: {manifest.num_features} of {manifest.feature_layer}, a second output")
    if manifest.engine is not None:
        lines.append(f"  engine: {manifest.engine.words()}")
    if manifest.checkpoint.init is not None:
        lines.append(f"  {manifest.checkpoint.init.words()}")
    lines.append(f"  precision, read from {ONNX_NAME}: {manifest.precision_check.words()}")
    if needs := manifest.precision_check.runtime_words():
        lines.append(f"  needs {needs}")
    if manifest.cpu is not None:
        lines.append(f"  {CPU_NAME}: {manifest.cpu.words()}")
    if manifest.calibration is not None:
        lines.append(f"  {manifest.calibration.words()}")
    if manifest.report is not None:
        lines += [f"  {line}" for line in gate_lines(manifest.report, manifest.rebuild)]
    return lines


def gate_lines(gate: GateReport, rebuild: Rebuild | None = None) -> list[str]:
    """Format the gate's report as a table of the checkpoint, the ONNX files and the engine.

    Args:
        gate: the report of the export.
        rebuild: the comparison of an engine that was built later.
    """
    unreadable = f", {gate.num_failed} more could not be read" if gate.num_failed else ""
    lines = [
        f"gate: {gate.num_images} of {gate.num_available} images of {gate.data}/{gate.split}{unreadable}",
        f"  limits: {limit_words(gate.limits)}",
        _COLUMNS.format(*_HEADER),
        _COLUMNS.format("checkpoint", "", "", "", "", "", _percent(gate.checkpoint_accuracy)),
        *(_row(name, found) for name, found in gate.agreements.items()),
    ]
    lines += _feature_line(gate.agreements, gate.limits)
    if rebuild is not None:
        return lines + rebuild_lines(rebuild, gate.limits)
    if gate.engine_not_run is not None:
        lines.append(f"    {ENGINE_NAME}  not run: {gate.engine_not_run}")
    return [line.rstrip() for line in lines]


def rebuild_lines(rebuild: Rebuild, limits: Limits) -> list[str]:
    """Format the comparison of an engine that was built from the ONNX file after the export."""
    when = rebuild.created.partition(".")[0]
    old = rebuild.replaces
    before = (
        "" if old is None else f", in place of one of {old.library} {old.version} for {', '.join(old.gpus)}"
    )
    first = f"  {ENGINE_NAME} was built again on {when} UTC{before}"
    if rebuild.agreement is None:
        return [first, f"    {ENGINE_NAME}  unknown: {rebuild.unknown}"]
    return [
        f"{first}; against {ONNX_NAME} on {rebuild.num_images} images of {rebuild.data}/{rebuild.split}:",
        _COLUMNS.format(ONNX_NAME, "", "", "", "", "", _percent(rebuild.onnx_accuracy)),
        _row(ENGINE_NAME, rebuild.agreement),
        *_feature_line({ENGINE_NAME: rebuild.agreement}, limits),
    ]


def limit_words(limits: Limits) -> str:
    """The limits of the gate in one line."""
    parts = [
        f"top-1 agreement of at least {limits.min_top1_agreement:.4g}",
        f"top-5 of at least {limits.min_top5_agreement:.4g}",
    ]
    if limits.max_probability_difference is not None:
        parts.append(f"probabilities within {limits.max_probability_difference:.0e}")
    if limits.max_accuracy_loss is not None:
        parts.append(f"accuracy at most {limits.max_accuracy_loss * 100:g} points lower")
    return ", ".join(parts)


def _row(name: str, found: Agreement) -> str:
    *agreement, accuracy, _ = astuple(found)  # features have a line of their own
    return _ROW.format(name, *agreement, _percent(accuracy))


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.2%}"


def _feature_line(agreements: Mapping[str, Agreement], limits: Limits) -> list[str]:
    """`  features: within 3e-07 of the largest in model.onnx, …; at most 1e-04`; none without features."""
    parts = [
        f"{found.max_feature_difference:.1e} in {name}"
        for name, found in agreements.items()
        if found.max_feature_difference is not None
    ]
    if not parts:
        return []
    most = "" if limits.max_feature_difference is None else f"; at most {limits.max_feature_difference:g}"
    return [f"  features: largest difference, of the largest feature: {', '.join(parts)}{most}"]
