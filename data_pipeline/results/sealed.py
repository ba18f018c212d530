"""Manifests that carry a hash of their own content, so that a changed digit does not go unnoticed.

A manifest holds the hashes of all files beside it, so its own names the whole.
"""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

SEAL = "manifest_sha256"
"""The key of the hash."""


def seal_of(plain: dict[str, Any]) -> str:
    """SHA-256 of a manifest's keys but its own, whatever their order and spacing in the file.

    >>> seal_of({"step": 1, "epoch": 2}) == seal_of({"epoch": 2, "step": 1, SEAL: "of another content"})
    True
    """
    content = {key: value for key, value in plain.items() if key != SEAL}
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()


def encode_sealed(manifest: msgspec.Struct) -> bytes:
    """The text of a manifest, readable, with its hash."""
    plain = msgspec.json.decode(msgspec.json.encode(manifest))
    return msgspec.json.format(msgspec.json.encode({**plain, SEAL: seal_of(plain)})) + b"\n"


def take_seal(plain: dict[str, Any]) -> bool:
    """Take the hash out of a manifest that was read. Returns whether it is that of the content."""
    expected = seal_of(plain)
    return bool(plain.pop(SEAL, None) == expected)
