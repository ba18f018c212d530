"""`alexnet data download`: fetch, verify and unpack a dataset into a folder that `open_dataset` reads."""

from __future__ import annotations

import difflib
import json
import logging
import shutil
from pathlib import Path

from data_pipeline.common.errors import CorruptFileError, SaveError, UserError, raising
from data_pipeline.common.text import printable
from data_pipeline.datasets.open import open_dataset
from data_pipeline.download.catalog import CATALOG, Archive
from data_pipeline.download.cifar import write_cifar
from data_pipeline.download.fetch import fetch
from data_pipeline.download.unpack import unpack

log = logging.getLogger("data_pipeline")

MARKER = "download.json"


def download(name: str, target: Path | None = None, *, mirror: str | None = None) -> Path:
    """Download a dataset of the catalog into a folder, which appears whole or not at all.

    The archive is kept beside it until it is unpacked, so that an interrupted download resumes.

    Args:
        name: see `data_pipeline.download.catalog`.
        target: the folder to make; None for `data/<name>`. Nothing is done if the dataset is there.
        mirror: address of a folder that holds the same file; its content is verified all the same.
    Returns:
        The folder.
    Raises:
        UserError: an unknown name, a folder that holds something else, or a server that does not answer.
        CorruptFileError: the file that arrived is not the published one.
        SaveError: a full disk.
    """
    if name not in CATALOG:
        near = difflib.get_close_matches(name, CATALOG, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"no dataset {name!r}: {hint}there are {', '.join(CATALOG)}")
    archive = CATALOG[name]
    target = Path("data") / name if target is None else Path(target)
    if _is_there(target, name):
        log.info("%s is there already", printable(target))
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{printable(target)} exists and is not {name}: give an empty or a new folder")
    url = archive.url if mirror is None else f"{mirror.rstrip('/')}/{archive.file_name}"
    packed = target.parent / archive.file_name
    log.info("%s from %s", name, url)
    fetch(url, packed, size_bytes=archive.size_bytes, md5=archive.md5, sha256=archive.sha256)
    _unpack(name, archive, packed, target)
    return target


def _unpack(name: str, archive: Archive, packed: Path, target: Path) -> None:
    """Unpack the archive beside the target, check it, move it in place, and delete it."""
    unpacked = target.parent / f".{target.name}-unpacking"
    try:
        with raising(SaveError, f"{printable(target)} could not be written"):
            shutil.rmtree(unpacked, ignore_errors=True)
            unpack(packed, unpacked, max_bytes=archive.max_bytes, max_files=archive.max_files)
            folder, counts = _arrange(name, archive, unpacked)
            folder.chmod(0o755)
            folder.rename(target)  # replaces an empty folder, never a full one
        log.info(
            "%s: %d training and %d validation images", printable(target), counts["train"], counts["val"]
        )
    except CorruptFileError:
        packed.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)
    packed.unlink()


def _arrange(name: str, archive: Archive, unpacked: Path) -> tuple[Path, dict[str, int]]:
    """Bring the unpacked files into a layout that training reads, and count the images of each split."""
    folder = unpacked / archive.folder
    if not folder.is_dir():
        raise CorruptFileError(f"{archive.file_name} does not hold a folder {archive.folder}")
    if archive.layout != "as it is":
        made = unpacked / f"{archive.folder}-made"
        write_cifar(folder, made, archive.layout)
        folder = made
    if archive.class_names:
        lines = [f"{synset_id}\t{text}\n" for synset_id, text in archive.class_names.items()]
        (folder / "words.txt").write_text("".join(lines), encoding="utf-8")
    try:
        counts = {split: len(open_dataset(folder, split, quarantine=False)) for split in ("train", "val")}
    except UserError as error:
        raise CorruptFileError(f"{archive.file_name} is not laid out as {name} is: {error}") from error
    shutil.rmtree(folder / ".alexnet", ignore_errors=True)
    (folder / ".alexnet").mkdir()
    (folder / ".alexnet" / MARKER).write_text(json.dumps({"name": name, "images": counts}))
    return folder, counts


def _is_there(target: Path, name: str) -> bool:
    try:
        marker = json.loads((target / ".alexnet" / MARKER).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and marker.get("name") == name
