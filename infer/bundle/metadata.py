"""The metadata of an ONNX file, which Netron and ONNX Runtime show, compared with the manifest."""

from __future__ import annotations

import msgspec

from infer.bundle.manifest import Manifest


def metadata_mismatch(metadata: dict[str, str], manifest: Manifest) -> str | None:
    """Describe how an ONNX file's metadata disagree with the manifest, or None.

    A mismatch means that the file is from another export.

    Args:
        metadata: `custom_metadata_map` of ONNX Runtime; `metadata_props` in the file.
        manifest: of the bundle that the file lies in.
    """
    if metadata.get("checkpoint_sha256") != manifest.checkpoint.sha256:
        return "another checkpoint"
    for key, expected, difference in (
        ("classes", manifest.classes, "other labels"),
        ("labels", manifest.class_labels, "other names of its classes"),
        ("preprocessing", manifest.preprocessing, "another preprocessing"),
    ):
        try:
            found = msgspec.json.decode(metadata.get(key, ""), type=type(expected))
        except msgspec.MsgspecError:
            return difference
        if found != expected:
            return difference
    return None
