"""Bundles: what is read back is what was written, and nothing else is believed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest

from data_pipeline.common.errors import CorruptFileError, UserError
from infer.bundle.load import find_bundle, is_bundle, load_bundle, names_beside
from infer.bundle.manifest import SCHEMA_VERSION
from infer.bundle.schema import MANIFEST_NAME
from infer.bundle.write import measure_files, staging_folder, write_bundle
from tests.helpers.infer_samples import edit_manifest, tiny_manifest, write_tiny


def test_written_bundle_is_read_back_without_leftovers(tmp_path: Path) -> None:
    target = tmp_path / "export" / "onnx-fp32"
    for content in (b"first", b"second"):
        with staging_folder(target) as staging:
            (staging / "model.onnx").write_bytes(content)
            manifest = msgspec.structs.replace(tiny_manifest(), files=measure_files(staging, ["model.onnx"]))
            bundle = write_bundle(staging, target, manifest)
        assert bundle.manifest == manifest
        assert bundle.onnx_path.read_bytes() == content
        assert load_bundle(target / MANIFEST_NAME) == bundle
        assert [p.name for p in target.parent.iterdir()] == ["onnx-fp32"]


def test_failed_export_leaves_the_earlier_one(tmp_path: Path) -> None:
    target = write_tiny(tmp_path / "onnx-fp32")
    with pytest.raises(RuntimeError, match="stop"), staging_folder(target) as staging:
        (staging / "model.onnx").write_bytes(b"half")
        raise RuntimeError("stop")
    assert load_bundle(target).onnx_path.read_bytes() == b"not really a model"
    assert [p.name for p in tmp_path.iterdir()] == ["onnx-fp32"]


def test_export_never_replaces_what_it_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years")
    with pytest.raises(UserError, match="thesis"), staging_folder(tmp_path):
        pass
    target = write_tiny(tmp_path / "export")
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes"), staging_folder(target):
        pass
    with pytest.raises(UserError, match="not a folder"), staging_folder(tmp_path / "thesis.txt"):
        pass


def test_card_and_weights_are_ours_and_not_read(tmp_path: Path) -> None:
    """They are no part of what is verified; a new export replaces them, and each leads to its bundle."""
    folder = write_tiny(tmp_path / "b")
    for name in ("README.md", "model.safetensors"):
        (folder / name).write_bytes(b"anything")
        (folder / name).chmod(0)
        assert is_bundle(folder / name) and find_bundle(folder / name) == folder
    assert names_beside(folder) == ["README.md", "model.safetensors"]
    assert load_bundle(folder).manifest.files.keys() == {"model.onnx"}
    with staging_folder(folder) as staging:
        assert staging.is_dir()
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("/etc/passwd")
    assert names_beside(folder) == ["model.safetensors"], "a link is not copied into another bundle"


@pytest.mark.parametrize("content", [b"not really a mode", b"not really a modeL", b""])
def test_tampered_file_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write_tiny(tmp_path / "b")
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"model\.onnx: not what was exported"):
        load_bundle(folder)


def test_missing_and_linked_files_are_refused(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "b")
    (folder / "model.onnx").rename(tmp_path / "elsewhere")
    with pytest.raises(CorruptFileError, match="missing"):
        load_bundle(folder)
    (folder / "model.onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptFileError, match="not a plain file"):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a/b", ".hidden", "..", "", "bundle.json"])
def test_file_names_cannot_leave_the_folder(tmp_path: Path, name: str) -> None:
    folder = write_tiny(tmp_path / "b")
    files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    edit_manifest(folder, files={**files, name: files["model.onnx"]})
    with pytest.raises(CorruptFileError, match="leaves the bundle's folder"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ["cat"]}, "do not fit"),
        ({"max_batch": 0}, "max_batch"),
        ({"format": "trt"}, "lists model.engine"),
        ({"precision": "fp3"}, "precision"),
        ({"report": None}, "no gate report"),
        ({"surprise": 1}, "surprise"),
        ({"files": {}}, "lists model.onnx"),
    ],
)
def test_manifest_that_contradicts_itself_is_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    folder = write_tiny(tmp_path / "b")
    edit_manifest(folder, **changes)
    with pytest.raises(CorruptFileError, match=words):
        load_bundle(folder)


def test_manifest_that_is_not_json_or_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tiny(tmp_path / "b")
    for garbage in (b"{", b"\xff\xfe", b"[]", b""):
        (folder / MANIFEST_NAME).write_bytes(garbage)
        with pytest.raises(CorruptFileError, match=r"bundle\.json"):
            load_bundle(folder)
    write_tiny(folder)
    monkeypatch.setattr("infer.bundle.manifest.MAX_MANIFEST_BYTES", 100)
    with pytest.raises(CorruptFileError, match="larger than"):
        load_bundle(folder)


@pytest.mark.parametrize("name", ["bundle.json", "model.onnx", "model.cpu.onnx", "model.engine"])
def test_a_file_of_a_bundle_means_the_bundle(tmp_path: Path, name: str) -> None:
    folder = write_tiny(tmp_path / "b")
    (folder / name).touch()
    assert find_bundle(folder / name) == folder and is_bundle(folder / name) and is_bundle(folder)
    assert load_bundle(folder / name).folder == folder
    if name != "bundle.json":
        (tmp_path / name).touch()
        assert not is_bundle(tmp_path / name)
        with pytest.raises(UserError, match=f"{name} has no bundle.json beside it: name a folder that"):
            find_bundle(tmp_path / name)


def test_another_schema_is_the_users_to_solve(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "b")
    edit_manifest(folder, schema_version=SCHEMA_VERSION + 1, something_new=True)
    with pytest.raises(UserError, match="export the checkpoint again"):
        load_bundle(folder)


def test_newest_export_is_found_by_its_manifests_date(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    with pytest.raises(UserError, match="run `alexnet export` first"):
        find_bundle(None, runs=runs)
    newest = write_tiny(
        runs / "a" / "export" / "onnx-fp32", tiny_manifest(created="2026-03-01T00:00:00.000000+00:00")
    )
    older = write_tiny(
        runs / "b" / "export" / "onnx-fp32", tiny_manifest(created="2026-02-01T00:00:00.000000+00:00")
    )
    unfinished = write_tiny(
        runs / "b" / "export" / ".trt-fp32.building-x",
        tiny_manifest(created="2026-04-01T00:00:00.000000+00:00"),
    )
    os.utime(newest / MANIFEST_NAME, (0, 0))
    assert unfinished.exists()
    assert find_bundle(None, runs=runs) == newest
    assert find_bundle(runs / "b") == older
    assert find_bundle(older / MANIFEST_NAME) == older
    assert find_bundle(older) == older
    # A damaged newest export is chosen, and then refused, rather than passed over for an older one.
    (older / MANIFEST_NAME).write_text("{")
    assert find_bundle(None, runs=runs) == older


def test_wrong_bundle_path_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        find_bundle(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no bundle\.json"):
        find_bundle(tmp_path)
    with pytest.raises(UserError, match=r"holds no bundle\.json"):
        load_bundle(tmp_path)
