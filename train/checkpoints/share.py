"""A checkpoint's weights as safetensors, with what they need to be used: configuration, classes, origin."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

import msgspec
from safetensors.torch import save

from train.checkpoints.load import Checkpoint
from train.config.schema import RunConfig


def encode_weights(checkpoint: Checkpoint, config: RunConfig) -> bytes:
    """The weights that were evaluated, in the safetensors format, with metadata.

    Bytes, since the library's own writer reports a full disk without the system's error.

    Args:
        checkpoint: a verified checkpoint.
        config: its configuration, or `without_places` of it.
    """
    weights = {name: tensor.contiguous() for name, tensor in checkpoint.weights.items()}
    metadata = {
        "format": "pt",
        "config": msgspec.json.encode(config).decode(),
        # Python's own JSON: names of folders need not be UTF-8
        "classes": json.dumps(checkpoint.classes),
        "labels_text": json.dumps(checkpoint.labels_text),
        "checkpoint_sha256": checkpoint.sha256,
    }
    return save(weights, metadata)


def without_places(config: RunConfig) -> RunConfig:
    """A configuration that names no place on the machine that trained: for files that are passed on."""
    data = msgspec.structs.replace(config.data, root=None, quarantine=None)
    plain = msgspec.to_builtins(msgspec.structs.replace(config, data=data))
    return msgspec.convert(_last_parts(plain), RunConfig)


def _last_parts(value: Any) -> Any:
    """Nested plain values, with every string that is a path replaced by its last part."""
    if isinstance(value, dict):
        return {key: _last_parts(inner) for key, inner in value.items()}
    return PurePath(value).name if isinstance(value, str) and "/" in value else value
