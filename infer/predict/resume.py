"""What the rows of a run depend on besides its inputs, kept with them so that a later run can go on."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import sha256_of
from data_pipeline.common.text import printable
from infer.bundle.load import Bundle
from infer.bundle.schema import MANIFEST_NAME

log = logging.getLogger("infer")


class RunIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model and the options that decide what a row says.

    Who decodes, the backend, the device and the size of batches are not among them: they change the last
    digits of a probability.

    Args:
        model_sha256: of the bundle's manifest, which holds the hashes of its files.
        top: classes a row.
        min_probability: classes below are left out.
        ten_crop: whether ten views of each image are averaged.
    """

    model_sha256: str
    top: int
    min_probability: float
    ten_crop: bool


def identity_of(bundle: Bundle, *, top: int, min_probability: float, ten_crop: bool) -> RunIdentity:
    """The identity of a run with a verified bundle."""
    return RunIdentity(
        model_sha256=sha256_of(bundle.folder / MANIFEST_NAME),
        top=top,
        min_probability=float(min_probability),
        ten_crop=ten_crop,
    )


def check_identity(begun: RunIdentity, now: RunIdentity, rows: Path) -> None:
    """Refuse to go on with another model or other options than the rows were begun with.

    Raises:
        UserError: they differ; names the first difference.
    """
    where = f"--resume: the rows in {printable(rows)}"
    if begun.model_sha256 != now.model_sha256:
        raise UserError(
            f"{where} are of another model (its bundle.json has SHA-256 {begun.model_sha256[:12]}…): "
            "give that one as --model, or another --output"
        )
    for name in ("top", "min_probability", "ten_crop"):
        before, after = getattr(begun, name), getattr(now, name)
        if before != after:
            raise UserError(
                f"{where} were begun with {name} {before}, and now it is {after}: "
                f"give --{name.replace('_', '-')} as it was, or another --output"
            )


def check_saved_identity(rows: Path, now: RunIdentity) -> None:
    """Hold a run against what `save_identity` kept beside the rows; where it kept nothing, that is said.

    Raises:
        UserError: the rows are of another model or other options.
        CorruptFileError: what was kept is damaged.
    """
    path = identity_path(rows)
    try:
        begun = msgspec.json.decode(path.read_bytes(), type=RunIdentity)
    except FileNotFoundError:
        log.warning(
            "%s is not there: nobody knows whether the rows in %s are of this model",
            printable(path),
            printable(rows),
        )
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(
            f"{printable(path)} is damaged: {error}; remove it to go on without this check"
        ) from error
    else:
        check_identity(begun, now, rows)


def save_identity(rows: Path, identity: RunIdentity) -> None:
    """Keep the identity beside a file of rows; nothing beside what is no plain file, such as /dev/null."""
    path = identity_path(rows)
    if not rows.exists() or rows.is_file():
        try:
            path.write_bytes(msgspec.json.encode(identity))
        except OSError as error:
            log.warning("cannot write %s: --resume will not know the model", printable(path))
            log.debug("%s", error)


def identity_path(rows: Path) -> Path:
    """Where the identity of a file of rows stands."""
    return rows.with_name(f".{rows.name}.run.json")
