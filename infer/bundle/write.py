"""Write a bundle so that a reader sees all of it or none of it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import fsync_path, sha256_of, writing_to
from data_pipeline.results.card import CARD_NAME, WEIGHTS_NAME
from data_pipeline.results.sealed import encode_sealed
from infer.bundle.load import FILE_NAMES, Bundle, file_problem, load_bundle, names_beside
from infer.bundle.manifest import Manifest
from infer.bundle.schema import MANIFEST_NAME, FileEntry


@contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """Make a hidden folder beside `target` to build an export in; it is deleted afterwards in any case.

    Raises:
        UserError: `target` holds something that is not an export of ours, which is never replaced; or it
            cannot be written.
    """
    check_replaceable(target)
    with writing_to(target, "name another folder for the export"):
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{target.name}.building-"
        folder = tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent, ignore_cleanup_errors=True)
    with folder as name:
        yield Path(name)


def check_replaceable(target: Path) -> None:
    """Raise unless `target` is missing, an empty folder, or an earlier export.

    Raises:
        UserError: names the file that is in the way.
    """
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise UserError(f"--out {target} is not a folder: name another place for the export")
    names = {child.name for child in target.iterdir()}
    if not names:
        return
    try:
        ours = load_bundle(target).manifest.files.keys() | {MANIFEST_NAME, CARD_NAME, WEIGHTS_NAME}
    except CorruptFileError:
        # Exporting again is the cure for a damaged export; then all file names that an export has are ours.
        ours = set(FILE_NAMES)
    except UserError:
        ours = set()
    if strange := sorted(names - ours):
        raise UserError(f"--out {target} holds {strange[0]!r}, which no export wrote: name another folder")


def measure_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Hash files of a folder for the manifest."""
    return {
        name: FileEntry(sha256=sha256_of(folder / name), size_bytes=(folder / name).stat().st_size)
        for name in names
    }


def copy_files(bundle: Bundle, names: Iterable[str], folder: Path) -> None:
    """Copy files of a bundle and verify the copies.

    Raises:
        CorruptFileError: a file that changed since the bundle was verified.
    """
    for name in names:
        shutil.copyfile(bundle.folder / name, folder / name)
        if file_problem(folder / name, bundle.manifest.files[name]):
            raise CorruptFileError(f"{bundle.folder / name} changed while it was copied")


def copy_beside(bundle: Bundle, folder: Path) -> None:
    """Copy the card and the weights of a bundle, where it has them: they are not in its manifest."""
    for name in names_beside(bundle.folder):
        shutil.copyfile(bundle.folder / name, folder / name)


def sync_files(folder: Path, names: Iterable[str]) -> None:
    """Make a finished folder and its files readable for all, and flush them to the disk."""
    for name in names:
        (folder / name).chmod(0o644)
        fsync_path(folder / name)
    fsync_path(folder)
    folder.chmod(0o755)


def write_bundle(staging: Path, target: Path, manifest: Manifest) -> Bundle:
    """Complete the export in `staging` and move it to `target` in one step.

    An earlier export of the same name is moved aside (to a hidden folder beside it) first and deleted last,
    so that a crash leaves the old one or the new one on the disk, never a mixture.

    Args:
        staging: holds the files that `manifest.files` names, and the card and the weights, which it does not.
        target: where the bundle shall be.
        manifest: complete, with the gate's report.
    Returns:
        The bundle, read back and verified.
    """
    assert manifest.report is not None, "only what passed the gate is shipped"
    (staging / MANIFEST_NAME).write_bytes(encode_sealed(manifest))
    sync_files(staging, (*manifest.files, MANIFEST_NAME, *names_beside(staging)))
    aside = staging.with_name(staging.name + ".replaced")
    if target.exists():
        target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    fsync_path(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
    return load_bundle(target)
