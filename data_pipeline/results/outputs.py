"""Outputs: what a command may write to, and what it never replaces.

Files are told apart by identity (device and inode), so that links, `..` and other spellings do not matter.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from data_pipeline.common.errors import UserError
from data_pipeline.common.files import check_writable, read_head
from data_pipeline.common.text import printable

Name = str | os.PathLike[str]


def identity_at(path: Name) -> tuple[int, int] | None:
    """Device and inode of what a path leads to; None where there is nothing."""
    try:
        status = os.stat(path)  # noqa: PTH116 - half the cost of Path.stat, and lists are long
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def is_same_place(one: Name, other: Name) -> bool:
    """Whether two paths lead to one file, also to one that is not there yet."""
    there = identity_at(one), identity_at(other)
    if there != (None, None):
        return there[0] == there[1]
    return os.path.realpath(one) == os.path.realpath(other)


def check_output(
    path: Path,
    option: str,
    is_ours: Callable[[Path], bool] | None,
    ours: str,
    *,
    named: Iterable[Name] = (),
    found: Iterable[Name] = (),
) -> bool:
    """Refuse to write to a file that is an input, or that holds what this program did not write.

    Devices and pipes hold nothing that could be lost, nor do empty files, unless they are inputs.

    Args:
        path: the file to write.
        option: how the command line names it, for messages.
        is_ours: whether a file holds what may be replaced; it is asked of a regular file that is not empty.
            None for outputs that cannot be told from others of their kind, which are never replaced.
        ours: what may be replaced, for messages: "rows of predictions"; without `is_ours`, what is not.
        named: inputs that are named themselves, which are always compared.
        found: all inputs. They may be millions, and are compared only where the content is not ours: else
            they hold no such file anyway.
    Returns:
        Whether there is a file of ours, which writing would replace.
    Raises:
        UserError: an input, a folder, or a file with other content.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):
        return False  # nothing is there; whether it can be written is seen when it is
    where = f"{option} {printable(path)}"
    if stat.S_ISCHR(status.st_mode) or stat.S_ISFIFO(status.st_mode):
        return False
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no file"
        raise UserError(f"{where} is {kind}: name a file")
    refuse_input(path, option, named)
    if status.st_size and is_ours is not None and is_ours(path):
        return True
    refuse_input(path, option, found)
    if status.st_size and is_ours is None:
        raise UserError(f"{where} exists: {ours} are never replaced; name another file")
    if status.st_size:
        raise UserError(f"{where} exists and is not {ours}: name another file")
    return False


def check_page(
    path: Path, option: str, generator: str, ours: str, suffixes: Collection[str] = (".html",)
) -> None:
    """Refuse an HTML page that will not be written, before the work. An earlier page of its kind is replaced.

    Args:
        path, option, ours: as in `check_output`.
        generator: the element in the head of pages of this kind, by which they are known.
        suffixes: that the name may end in.
    Raises:
        UserError: another suffix, no such folder, one that cannot be written to, or a file of another kind.
    """
    where = f"{option} {printable(path)}"
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{where}: the name must end in .html")
    if not path.parent.is_dir():
        raise UserError(f"{where}: there is no folder {printable(path.parent)}")
    check_output(path, option, lambda path: generator.encode() in read_head(path, 4096), ours)
    check_writable(path.parent, f"name another file with {option}", path)


def refuse_input(path: Path, option: str, inputs: Iterable[Name]) -> None:
    """Refuse an output that is one of the inputs.

    Raises:
        UserError: it is.
    """
    here = identity_at(path)
    if here is not None and any(identity_at(name) == here for name in inputs):
        raise UserError(f"{option} {printable(path)} is an input, or a list of inputs: name another file")
