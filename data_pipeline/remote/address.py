"""Addresses of data that is elsewhere: s3://, gs://, https:// and http://."""

from __future__ import annotations

import os
import re

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable

# A `Path` has one of the two slashes: command lines make paths of what they are given.
_ADDRESS = re.compile(r"(s3|gs|https?):/{1,2}(?=[^/])")


def remote_url(root: str | os.PathLike[str]) -> str | None:
    """The address that a text or a path stands for, without a slash at its end; None for a place here.

    Raises:
        UserError: an address with a query or a fragment, to which no file's name can be added.

    >>> from pathlib import Path
    >>> remote_url(Path("s3://bucket/shards/")), remote_url("data/s3")
    ('s3://bucket/shards', None)
    """
    text = os.fspath(root)
    if (found := _ADDRESS.match(text)) is None:
        return None
    if "?" in text or "#" in text:
        raise UserError(f"{printable(text)}: name a folder of shards, without what follows ? or #")
    return f"{found[1]}://{text[found.end() :].rstrip('/')}"


def is_http(url: str) -> bool:
    """Whether an address is one of HTTP, which needs no other package and takes no upload."""
    return url.startswith(("https://", "http://"))


def name_of(url: str) -> str:
    """The last part of an address, as the name of a folder.

    >>> name_of("gs://bucket/imagenet-256"), name_of("https://example.org/a b/..")
    ('imagenet-256', 'shards')
    """
    name = url.rpartition("/")[2]
    return name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) else "shards"
