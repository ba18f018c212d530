"""Opens the validation images for the sections with pictures, or says in each why they are not there."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.text import printable
from infer.report.mistakes import make_mistakes
from infer.report.page import Section, note, table
from infer.report.pictures import TITLES, Pictures, make_neighbours, make_predictions
from infer.report.source import Source, short_labels


def make_picture_sections(source: Source, data: Path | None) -> dict[str, Section]:
    """Make the sections, or say in each why its pictures are not there.

    Args:
        data: see `infer.report.write.write_report`.
    Raises:
        UserError: the data that was named is not there, has other classes, or has no checkpoint to go with.
    """
    if source.checkpoint is None:
        if data is not None:
            raise UserError(f"--data is for pictures, and they need a checkpoint: {source.no_checkpoint}")
        return _without(source, f"Not shown: {source.no_checkpoint}.")
    from infer.report.look import open_looker
    from train.evaluate import load_split

    try:
        split = load_split(source.checkpoint, data, "val")
    except (UserError, CorruptFileError) as error:
        if data is not None:
            raise
        root = str(source.checkpoint.config.data.root or "")
        why = str(error).replace(str(source.run), source.name)
        if root.startswith("/"):
            why = why.replace(root, f"…/{Path(root).name}")
        return _without(source, f"Not shown: {why}.")
    with open_looker(source.checkpoint) as looker:
        look = looker.look(split)
        if not len(look.labels):
            return _without(source, f"Not shown: none of {look.num_failed} validation images could be read.")
        names, labels = source.checkpoint.classes, source.checkpoint.class_labels
        shown = short_labels([printable(name) for name in names], [printable(label) for label in labels])
        pictures = Pictures(look, looker, tuple(shown))
        made = (make_predictions(pictures), make_neighbours(pictures), make_mistakes(pictures))
    return {section.key: section for section in made}


def _without(source: Source, why: str) -> dict[str, Section]:
    """The sections without images; of the mistakes, those that were recorded are listed."""
    bodies = dict.fromkeys(TITLES, note(why))
    if source.report is not None and source.report.mistakes:
        labels = source.labels
        rows = [
            (found.path, labels.get(found.truth, found.truth), labels.get(found.predicted, found.predicted),
             f"{found.probability:.1%}")
            for found in source.report.mistakes
        ]  # fmt: skip
        bodies["mistakes"] += table(("image", "is", "taken for", "probability"), rows)
    return {key: Section(key, title, bodies[key]) for key, title in TITLES.items()}
