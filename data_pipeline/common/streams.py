"""The standard streams of a process: UTF-8 whatever the locale says, and readers that went away."""

from __future__ import annotations

import codecs
import errno
import io
import locale
import os
import select
import sys
from contextlib import suppress
from typing import BinaryIO, NoReturn, cast

EXIT_BROKEN_PIPE = 128 + 13
"""The exit code that a shell shows for a program ended by SIGPIPE, as `head` ends those before it."""


def require_utf8() -> None:
    """Start this program again in Python's UTF-8 mode, where the locale has another encoding.

    Python decodes the names of files by the locale, for the whole life of a process; names and labels that
    are written to files, or read from them, are UTF-8. In UTF-8 mode the two are the same.

    Source: PEP 540.
    """
    if sys.getfilesystemencoding() == "utf-8" or "utf8" in sys._xoptions:
        return
    os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def set_up_streams() -> None:
    r"""Make stdout and stderr take any text: a terminal gets what its locale can show, and \N escapes for the
    rest; files and pipes get UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding
            if "PYTHONIOENCODING" not in os.environ:
                encoding = terminal_encoding() if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def terminal_encoding() -> str:
    """The encoding of the locale, which UTF-8 mode hides."""
    with suppress(LookupError):
        return codecs.lookup(locale.nl_langinfo(locale.CODESET)).name
    return "utf-8"


class _Terminal(io.RawIOBase):
    """Takes UTF-8 for a terminal that shows another encoding."""

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        sys.stdout.write(bytes(data).decode("utf-8"))
        return len(data)

    def flush(self) -> None:
        if not self.closed:
            sys.stdout.flush()


def binary_stdout() -> BinaryIO:
    """Where rows in UTF-8 are written: stdout itself, or a terminal that must be shown another encoding."""
    if sys.stdout.isatty() and codecs.lookup(sys.stdout.encoding).name != "utf-8":
        return cast("BinaryIO", _Terminal())
    return sys.stdout.buffer


def raise_broken_pipe() -> NoReturn:
    """Raise what writing to a pipe without a reader raises."""
    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def silence_broken_streams() -> bool:
    """Whether the reader of stdout or stderr went away; then nothing more is written to that one."""
    broken = [stream for stream in (sys.stdout, sys.stderr) if _reader_is_gone(stream)]
    for stream in broken:
        with open(os.devnull, "wb") as nothing:  # noqa: PTH123 - a device
            os.dup2(nothing.fileno(), stream.fileno())  # else Python complains when it flushes at its end
    return bool(broken)


def _reader_is_gone(stream: object) -> bool:
    try:
        poller = select.poll()
        poller.register(stream.fileno(), 0)  # type: ignore[attr-defined]
        return any(event & select.POLLERR for _, event in poller.poll(0))
    except (OSError, ValueError, AttributeError):  # closed, or no stream of the system
        return False
