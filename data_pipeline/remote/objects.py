"""Single files elsewhere: fetched over HTTP or through fsspec, resumed and verified; put through fsspec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.common.console import Progress
from data_pipeline.common.errors import SaveError, UserError
from data_pipeline.download.fetch import BrokenOffError, RefusedError, copy_chunks, fetch, size_of
from data_pipeline.remote.address import is_http

ADVICE = "look whether it is the address of shards that `alexnet data shard` wrote, and may be read from here"
PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
"""The package that fsspec needs for each kind of address."""
_PROTOCOLS = {"s3": "s3", "gs": "gcs"}
_READ_BYTES = 1 << 23


def fetch_object(
    url: str,
    path: Path,
    progress: Progress,
    *,
    size_bytes: int | None = None,
    sha256: str = "",
    max_bytes: int,
) -> None:
    """Fetch one file; it appears under its name only when it is whole and verified.

    Args:
        url: its address.
        path: the file to write; what an earlier call left in `<name>.part` is resumed.
        progress: receives the megabytes.
        size_bytes, sha256: of the file, where they are known.
        max_bytes: the most that it may have, where its size is not known.
    Raises:
        UserError, CorruptFileError, SaveError: as `data_pipeline.download.fetch.fetch`.
    """
    fetch(
        url, path, size_bytes=size_bytes, sha256=sha256, max_bytes=max_bytes, progress=progress,
        advice=ADVICE, connection=None if is_http(url) else _read_object,
    )  # fmt: skip


def open_filesystem(url: str) -> tuple[Any, str]:
    """The file system of an address, as fsspec has it, and the address within it.

    Raises:
        UserError: a package is missing.
    """
    scheme, _, name = url.partition("://")
    try:
        import fsspec

        return fsspec.filesystem(_PROTOCOLS[scheme]), name
    except ImportError as error:
        package = PACKAGES[scheme]
        raise UserError(
            f"{scheme}:// needs fsspec and {package}: pip install 'alexnet[remote]' {package}"
        ) from error


def put_object(path: Path, url: str) -> None:
    """Write one file elsewhere, and compare its size there.

    Raises:
        UserError: a package is missing.
        SaveError: it could not be written.
    """
    files, name = open_filesystem(url)
    try:
        files.put_file(str(path), name)
        files.invalidate_cache()
        written = files.info(name)["size"]
    except Exception as error:  # each of fsspec's file systems has errors of its own
        raise SaveError(f"{url} could not be written: {_words(error)}") from error
    if written != path.stat().st_size:
        raise SaveError(f"{url} has {written} bytes after it was written, not {path.stat().st_size}")


def read_small_object(url: str, max_bytes: int) -> bytes | None:
    """The content of a small file elsewhere; None where there is none.

    Raises:
        UserError: it cannot be read, or a package is missing.
    """
    files, name = open_filesystem(url)
    try:
        return bytes(files.cat_file(name, start=0, end=min(max_bytes, files.info(name)["size"])))
    except FileNotFoundError:
        return None
    except Exception as error:  # each of fsspec's file systems has errors of its own
        raise UserError(f"{url} cannot be read: {_words(error)}") from error


def _read_object(url: str, part: Path, limit: int, progress: Progress) -> int:
    """Fetch through fsspec, from the end of the part; see `Connection`. It has time limits of its own."""
    files, name = open_filesystem(url)
    position = size_of(part)
    try:
        total = int(files.info(name)["size"])
        if position > total:
            part.unlink()
            raise BrokenOffError("what is there is shorter than the part that was kept")
        with files.open(name, block_size=_READ_BYTES) as source, part.open("ab", buffering=0) as file:
            source.seek(position)
            copy_chunks(source.read, file, limit - position, progress)
        return total
    except (BrokenOffError, UserError, SaveError):
        raise
    except (FileNotFoundError, PermissionError) as error:
        raise RefusedError(f"{url} is not there, or may not be read ({_words(error)})") from error
    except Exception as error:  # each of fsspec's file systems has errors of its own
        raise BrokenOffError(f"it cannot be read ({_words(error)})") from error


def _words(error: Exception) -> str:
    """An error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
