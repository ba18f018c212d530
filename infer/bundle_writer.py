"""Writing a bundle so that a reader sees all of it or none of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from data_pipeline.errors import CorruptFileError, UserError
from infer.bundle import MANIFEST_NAME, Bundle, FileEntry, Manifest, load_bundle, sha256_of


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target` to build an export in; gone afterwards, whatever happened.

    Raises:
        UserError: `target` holds something that is not an export of ours, which we will not replace.
    """
    check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.building-", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_replaceable(target: Path) -> None:
    """Refuse to write over anything but nothing, an empty folder, or an earlier export.

    Raises:
        UserError: with the name of what stands in the way.
    """
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise UserError(f"--out {target} is not a folder: name another place for the export")
    names = {child.name for child in target.iterdir()}
    if not names:
        return
    try:
        ours = load_bundle(target).manifest.files.keys() | {MANIFEST_NAME}
    except CorruptFileError:
        # A damaged export is what exporting again is the cure for; its file names are all ours.
        ours = {MANIFEST_NAME, "model.onnx", "model.engine"}
    except UserError:
        ours = set()
    if strange := sorted(names - ours):
        raise UserError(f"--out {target} holds {strange[0]!r}, which no export wrote: name another folder")


def write_bundle(staging: Path, target: Path, manifest: Manifest) -> Bundle:
    """Complete the export in `staging` and move it to `target` in one step.

    An earlier export of the same name is moved aside (to a hidden folder beside it) first and deleted last,
    so that a crash leaves the old one or the new one on the disk, never a mixture.

    Args:
        staging: holds the files that `manifest.files` names; their entries are measured here.
        target: where the bundle shall be.
        manifest: all but the measured file entries.
    """
    entries = {
        name: FileEntry(sha256=sha256_of(staging / name), size_bytes=(staging / name).stat().st_size)
        for name in manifest.files
    }
    manifest = msgspec.structs.replace(manifest, files=entries)
    text = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    (staging / MANIFEST_NAME).write_bytes(text)
    for name in (*entries, MANIFEST_NAME):
        (staging / name).chmod(0o644)
        _sync(staging / name)
    _sync(staging)
    staging.chmod(0o755)
    aside = staging.with_name(staging.name + ".replaced")
    if target.exists():
        target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
    return load_bundle(target)


def _sync(path: Path) -> None:
    """Have a file, or a folder's entries, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
