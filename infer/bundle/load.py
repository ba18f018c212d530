"""Find an exported folder, verify every file of it, and load it as a `Bundle`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import sha256_of
from data_pipeline.results.card import CARD_NAME, WEIGHTS_NAME
from infer.bundle.manifest import Manifest, read_manifest
from infer.bundle.schema import CPU_NAME, ENGINE_NAME, MANIFEST_NAME, ONNX_NAME, FileEntry

FILE_NAMES = frozenset({MANIFEST_NAME, ONNX_NAME, CPU_NAME, ENGINE_NAME, CARD_NAME, WEIGHTS_NAME})
"""Names of the files of an export. The last two are for people and other programs, and not read here."""


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its folder and its manifest."""

    folder: Path
    manifest: Manifest

    @property
    def onnx_path(self) -> Path:
        """The ONNX file; every bundle has one."""
        return self.folder / ONNX_NAME

    @property
    def cpu_path(self) -> Path:
        """The file that ONNX Runtime runs on a CPU: the form of the model for it, or the ONNX file."""
        return self.folder / (self.manifest.cpu.file if self.manifest.cpu else ONNX_NAME)

    @property
    def engine_path(self) -> Path | None:
        """The TensorRT plan, or None in a bundle of format `onnx`."""
        return self.folder / ENGINE_NAME if self.manifest.engine else None


def load_bundle(path: Path, *, without: Collection[str] = ()) -> Bundle:
    """Read a bundle and verify every file of it before anything uses one.

    Args:
        path: the bundle's folder, or a file in it.
        without: files that the caller will replace and not use; they are not verified.
    Raises:
        UserError: there is no bundle here, or one of another schema.
        CorruptFileError: the manifest is damaged, or a file is missing, a link, or not what was written.
    """
    folder = folder_of(path)
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        if name not in without and (problem := file_problem(folder / name, entry)):
            raise CorruptFileError(f"{folder / name}: {problem}; export the checkpoint again")
    return Bundle(folder, manifest)


def folder_of(path: Path) -> Path:
    """The bundle's folder, where a path names a file in it, which users take for the model; else the path."""
    inside = path.name in FILE_NAMES and (path.parent / MANIFEST_NAME).is_file()
    return path.parent if inside or path.name == MANIFEST_NAME else path


def names_beside(folder: Path) -> list[str]:
    """The card and the weights of a bundle, where they are there: files that its manifest does not list."""
    paths = [folder / name for name in (CARD_NAME, WEIGHTS_NAME)]
    return [path.name for path in paths if path.is_file() and not path.is_symlink()]


def is_bundle(path: Path) -> bool:
    """Whether a path names a bundle: its folder, or a file in it."""
    return path.name == MANIFEST_NAME or (folder_of(path) / MANIFEST_NAME).is_file()


def open_bundle(path: Path | None) -> Bundle:
    """Find a bundle and verify it: see `find_bundle` and `load_bundle`."""
    return load_bundle(find_bundle(path))


def file_problem(path: Path, entry: FileEntry) -> str | None:
    """Describe how a file differs from its entry, or None. A file of another size is not read."""
    if path.is_symlink() or not path.is_file():
        return "missing, or not a plain file"
    if path.stat().st_size != entry.size_bytes or sha256_of(path) != entry.sha256:
        return "not what was exported (another size or SHA-256)"
    return None


def find_bundle(path: Path | None, *, runs: Path = Path("runs")) -> Path:
    """Find the folder of a bundle: the one asked for, or the newest export.

    Args:
        path: a bundle's folder or a file in it, such as `model.onnx`; a run's folder stands for its newest
            export; None for the newest export of all runs.
        runs: folder of the runs that are searched when `path` is None.
    Raises:
        UserError: there is none.
    """
    if path is None:
        found = _newest(exports_under(runs))
        if found is None:
            raise UserError(f"no exported model under {runs}/: run `alexnet export` first, or name a bundle")
        return found
    folder = folder_of(path)
    if (folder / MANIFEST_NAME).is_file():
        return folder
    found = _newest(exports_of(path)) if path.is_dir() else None
    if found is None:
        what = f"holds no {MANIFEST_NAME}" if path.is_dir() else "does not exist"
        if path.is_file():
            what = f"has no {MANIFEST_NAME} beside it"
        raise UserError(f"{path} {what}: name a folder that `alexnet export` wrote")
    return found


def exports_of(run: Path) -> list[Path]:
    """The folders of a run's exports, by name, without those that are being built or replaced."""
    return _folders(run.glob(f"export/*/{MANIFEST_NAME}"))


def exports_under(runs: Path) -> list[Path]:
    """The folders of the exports of all runs, as `exports_of`."""
    return _folders(runs.glob(f"*/export/*/{MANIFEST_NAME}"))


def _folders(manifests: Iterable[Path]) -> list[Path]:
    return sorted(file.parent for file in manifests if not file.parent.name.startswith("."))


def _newest(folders: Iterable[Path]) -> Path | None:
    """The newest of these exports, by the time in the manifest."""
    return max(folders, key=lambda f: (_created(f), f.name), default=None)


def _created(folder: Path) -> float:
    """When a bundle was exported, in seconds since 1970; its file's time if the manifest cannot be read.

    So a damaged newest export is still the one that is chosen, and loading it reports what is wrong.
    """
    try:
        return datetime.fromisoformat(read_manifest(folder).created).timestamp()
    except (UserError, CorruptFileError, ValueError):
        return (folder / MANIFEST_NAME).stat().st_mtime


def data_of_run(bundle: Bundle) -> Path:
    """The data folder of the run that a bundle lies in; a bundle itself holds no paths.

    Raises:
        UserError: it lies in no run, or the run names no data.
    """
    config = bundle.folder.parent.parent / "config.json"
    try:
        return Path(msgspec.json.decode(config.read_bytes())["data"]["root"])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise UserError(
            f"{bundle.folder} does not lie in a run that names its data: use --data DIR"
        ) from error
