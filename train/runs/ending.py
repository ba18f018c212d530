"""Whether a run is over: after its last epoch, or before it by `stop_patience` or `max_hours`."""

from __future__ import annotations

from collections.abc import Sequence

from train.config.schema import RunConfig

LAST_EPOCH = "its last epoch is over"
"""The reason of a run that ended as configured; the others are of one that ended early."""


def why_over(
    config: RunConfig, epochs: float, val_errors: Sequence[float], seconds: float | None
) -> str | None:
    """Return why no step is to follow, or None where the run goes on; the same on all ranks.

    Args:
        epochs: that were trained, whole ones at the end of an epoch.
        val_errors: validation error (1 - top-1) of each epoch so far, in order.
        seconds: of training so far, the same on all ranks; None for no look at the time.
    """
    if epochs >= config.epochs:
        return LAST_EPOCH
    waited = epochs_without_better(val_errors)
    if config.stop_patience and epochs == int(epochs) and waited >= config.stop_patience:
        best = len(val_errors) - waited
        return (
            f"no better top-1 for {waited} epoch(s) after {1 - min(val_errors):.2%} of epoch {best} "
            f"(stop_patience): training ends after {epochs:g} of {config.epochs} epochs"
        )
    if config.max_hours and seconds is not None and seconds >= config.max_hours * 3600:
        return (
            f"{seconds / 3600:.3g} hour(s) of training (max_hours is {config.max_hours:g}): training ends "
            f"after {epochs:.3g} of {config.epochs} epochs; --resume auto goes on with a higher max_hours"
        )
    return None


def epochs_without_better(val_errors: Sequence[float]) -> int:
    """Count the epochs since the one with the best top-1; an equal one is no better one.

    >>> epochs_without_better([0.5, 0.25, 0.5, 0.25])
    2
    """
    return len(val_errors) - 1 - val_errors.index(min(val_errors)) if val_errors else 0
