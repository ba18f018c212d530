"""What an ONNX file says of itself at its top level, where Netron and ONNX Runtime show it."""

from __future__ import annotations

import msgspec

from infer.bundle.manifest import Manifest


def foreign_metadata(metadata: dict[str, str], manifest: Manifest) -> str | None:
    """In what a file's metadata contradict a manifest, or None: then the file is that of another export.

    Args:
        metadata: `custom_metadata_map` of ONNX Runtime; `metadata_props` in the file.
        manifest: of the bundle that the file lies in.
    """
    labels = metadata.get("labels", metadata.get("classes"))  # the first bundles had one kind of name only
    if metadata.get("checkpoint_sha256") != manifest.checkpoint.sha256:
        return "another checkpoint"
    if not _says(metadata.get("classes"), manifest.classes):
        return "other labels"
    if not _says(labels, manifest.class_labels):
        return "other names of its classes"
    if not _says(metadata.get("preprocessing"), manifest.preprocessing):
        return "another preprocessing"
    return None


def _says(text: str | None, expected: object) -> bool:
    """Whether a JSON text says just this."""
    try:
        return bool(msgspec.json.decode(text or "", type=type(expected)) == expected)
    except msgspec.MsgspecError:
        return False
