"""Fetches one file over HTTP: resumes where it broke off, detects stalls, keeps only what is verified."""

from __future__ import annotations

import http.client
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from data_pipeline.common.console import Progress, show_progress
from data_pipeline.common.errors import CorruptFileError, SaveError, UserError, raising
from data_pipeline.common.files import check_writable, fsync_path, hash_of
from data_pipeline.common.text import printable

log = logging.getLogger("data_pipeline")

CHUNK_BYTES = 1 << 18
STALL_S = 30.0
"""A connection that brings no byte for so long is closed, and another one opened."""

ATTEMPTS = 5
"""Connections in a row that may bring nothing new."""

PAUSE_S = 1.0
"""Wait before the second attempt; doubled before each one after it."""

ADVICE = "use another --mirror"
"""Advice for a server that refuses, in messages."""

_MB = 1_000_000
_LARGEST_BYTES = 1 << 40


class BrokenOffError(Exception):
    """A connection that ended early; the next one may resume."""


class RefusedError(Exception):
    """A connection that another one would not mend."""


Connection = Callable[[str, Path, int, Progress], int | None]
"""Appends what is missing to a part: address, part, the most bytes that it may have, progress in MB. Returns
the size of the whole file as far as it is known; raises the two errors above."""


def fetch(
    url: str,
    path: Path,
    *,
    size_bytes: int | None = None,
    md5: str = "",
    sha256: str = "",
    advice: str = ADVICE,
    max_bytes: int = _LARGEST_BYTES,
    progress: Progress | None = None,
    connection: Connection | None = None,
) -> None:
    """Download a file; it appears under its name only when it is whole and verified.

    An interrupted download leaves `<name>.part`, from which the next one resumes.

    Args:
        url: http or https, also after redirects.
        path: the file to write; nothing is fetched if it is there and verified.
        size_bytes, md5, sha256: its size, and its checksums in hexadecimal, where they are known.
        advice: what to do about a server that refuses, for messages.
        max_bytes: the most that a file of unknown size may have.
        progress: receives the megabytes, where others show it; None to show it here.
        connection: reads from elsewhere than HTTP.
    Raises:
        UserError: a refusal by the server, no connection that brings anything, or no place to write to.
        CorruptFileError: what arrived is not what was published; it is deleted.
        SaveError: a full disk.
    """
    if connection is None and urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url} is no http or https address")
    if path.is_file():
        if (wrong := _difference(path, size_bytes, md5, sha256)) is None:
            log.info("%s is there already, and verified", printable(path))
            return
        log.warning("%s is there already and %s: fetching it again", printable(path), wrong)
        path.unlink()
    part = path.with_name(f"{path.name}.part")
    check_writable(path.parent, "name another folder", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    title, total = f"download {url.rsplit('/', 1)[-1]}, MB", size_bytes and -(-size_bytes // _MB)
    limit = max_bytes if size_bytes is None else size_bytes
    with show_progress(title, total) if progress is None else nullcontext(progress) as shown:
        connect = partial(connection or _fetch_once, url, part, limit, shown)
        _fetch_all(url, part, size_bytes, limit, advice, connect)
    wrong = _difference(part, size_bytes, md5, sha256)
    if size_bytes is None and size_of(part) > max_bytes:
        wrong = f"has more than {max_bytes} bytes"
    if wrong is not None:
        part.unlink()
        raise CorruptFileError(
            f"{url} is not the file that was published: it {wrong}; it was deleted. Try again, or {advice}"
        )
    fsync_path(part)
    part.replace(path)


def _fetch_all(
    url: str, part: Path, size_bytes: int | None, limit: int, advice: str, connect: Callable[[], int | None]
) -> None:
    failed, best = 0, size_of(part)
    while size_bytes is None or size_of(part) < size_bytes:
        try:
            claimed = connect()
            for whole in filter(None, (claimed, size_bytes)):
                if (got := size_of(part)) < min(whole, limit + 1):
                    raise BrokenOffError(f"the connection ended early, at {got} of {whole} bytes")
            return
        except RefusedError as error:
            raise UserError(f"{error}; {advice}") from error
        except BrokenOffError as error:
            got = size_of(part)
            failed, best = (1, got) if got > best else (failed + 1, best)
            if failed >= ATTEMPTS:
                stays = f"what there is stays in {printable(part)}: run the same command to go on, or "
                raise UserError(
                    f"{url} could not be fetched: {error}, {failed} times in a row; "
                    f"{stays if got else ''}{advice}"
                ) from error
            log.warning("%s after %d bytes: trying again", error, got)
            time.sleep(PAUSE_S * 2 ** (failed - 1))


def _fetch_once(url: str, part: Path, limit: int, progress: Progress) -> int | None:
    """Fetch over one connection, from the end of the part to the end of the file; see `Connection`."""
    start = size_of(part)
    request = urllib.request.Request(url, headers={"User-Agent": "alexnet", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    opener = urllib.request.build_opener(_SameKindRedirects)
    try:
        with opener.open(request, timeout=STALL_S) as response:
            total = _total_bytes(response, start)
            if start and response.status != 206:
                log.info("the server cannot resume: starting anew")
                start = 0
            with part.open("ab" if start else "wb", buffering=0) as file:
                copy_chunks(response.read1, file, limit - start, progress)
            return total
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416:  # the part is longer than the file: another version of it
                part.unlink(missing_ok=True)
                raise BrokenOffError("the server has a shorter file than the part that was kept") from error
            if error.code in (408, 429) or error.code >= 500:
                raise BrokenOffError(f"the server answered {error.code} {error.reason}") from error
            raise RefusedError(f"{url}: the server answered {error.code} {error.reason}") from error
    except http.client.IncompleteRead as error:
        raise BrokenOffError("the connection ended early") from error
    except (http.client.HTTPException, OSError) as error:  # urllib wraps what fails before the answer
        reason = getattr(error, "reason", error)
        stalled = isinstance(reason, TimeoutError)
        raise BrokenOffError(
            f"no byte for {STALL_S:g} s" if stalled else f"no connection ({reason})"
        ) from error


def copy_chunks(read: Callable[[int], bytes], file: Any, limit: int, progress: Progress) -> None:
    """Write what is read, up to one byte above the limit: enough to know that it is too long."""
    room = limit + 1
    while room > 0 and (chunk := read(min(CHUNK_BYTES, room))):
        before = file.tell()
        with raising(SaveError, f"{printable(file.name)} could not be written"):
            file.write(chunk)
        room -= len(chunk)
        progress.advance(file.tell() // _MB - before // _MB)


def _total_bytes(response: Any, start: int) -> int | None:
    """The size of the whole file, from the server's headers."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != start:
            raise BrokenOffError("the server sent another range than it was asked for")
        return None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


class _SameKindRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects only to http and https, and never from https back to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in ("http", "https") or (old == "https" and new == "http"):
            raise RefusedError(f"{req.full_url} redirects to {newurl}, which is not as safe")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def size_of(path: Path) -> int:
    """The bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _difference(path: Path, size_bytes: int | None, md5: str, sha256: str) -> str | None:
    """Return how a file differs from the published one; None if it does not."""
    size = path.stat().st_size
    if size_bytes is not None and size != size_bytes:
        return (
            f"has {'more than ' if size > size_bytes else ''}{min(size, size_bytes)} bytes, not {size_bytes}"
        )
    for name, expected in (("sha256", sha256), ("md5", md5)):
        if expected and (found := hash_of(path, name)) != expected:
            return f"has the {name} {found}, not {expected}"
    return None
