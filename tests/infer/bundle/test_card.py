"""The card of a bundle: its code loads the model without ours, and a new engine renews only its section."""

from __future__ import annotations

import ast
import logging
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from infer.bundle.card import bundle_card, renew_card
from infer.bundle.gate_report import Rebuild
from infer.bundle.load import Bundle
from infer.predict.rows import OkRow
from infer.predictor import Predictor
from tests.helpers.images import photo
from tests.helpers.infer_samples import tiny_manifest, with_engine

TRAINING = ("AlexNet.", "## Recipe\n\n`demo`")


def test_code_of_the_card_computes_what_we_predict(bundle: Bundle, tmp_path: Path) -> None:
    """The block runs in a process in which our packages cannot be imported, on a picture not square."""
    card = (bundle.folder / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert len([line for line in block.splitlines() if line]) <= 10
    for name in (bundle.cpu_path.name, "model.onnx", "bundle.json"):
        shutil.copy(bundle.folder / name, tmp_path)
    photo(250, 331).save(tmp_path / "photo.jpg")
    program = (
        "import sys\n"
        f"sys.path.append({site.getsitepackages()[0]!r})\n"
        f"{block}"
        "from importlib.util import find_spec\n"
        "assert not any(map(find_spec, ('alexnet', 'train', 'infer', 'data_pipeline')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [ast.literal_eval(line) for line in done.stdout.splitlines()]
    with Predictor(bundle.folder, device="cpu", decoder="pillow", top=5) as predictor:
        (row,) = predictor([tmp_path / "photo.jpg"])
    assert isinstance(row, OkRow)
    assert [label for _, label in found] == [prediction.label for prediction in row.predictions]
    expected = [prediction.probability for prediction in row.predictions]
    assert [probability for probability, _ in found] == pytest.approx(expected, abs=1e-6)


def test_card_says_what_its_checkpoint_and_its_gate_say(bundle: Bundle) -> None:
    card = (bundle.folder / "README.md").read_text(encoding="utf-8")
    gate = bundle.manifest.report
    assert gate is not None
    for text in (
        "# AlexNet `paper`, recipe `demo`, fp32",
        "| top-1 | 50.00% |",
        "pixels; cut the centre square of 56 x 56.",
        f"gate: {gate.num_images} of {gate.num_available} images of digits/val",
        "- `model.engine`: tensorrt",
        "were computed from the images of `digits`",
    ):
        assert text in card, text
    assert str(bundle.folder.parents[2]) not in card


def test_a_new_engine_renews_its_section_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "README.md"
    renew_card(path, tiny_manifest())
    assert not path.exists(), "an older bundle has no card"
    path.write_text(bundle_card(tiny_manifest(), "digits", TRAINING) + "My own words.\n", encoding="utf-8")
    rebuild = Rebuild(created="2026-02-03T00:00:00", replaces=None, unknown="compared on no images: /srv/x")
    renew_card(path, msgspec.structs.replace(with_engine(), rebuild=rebuild))
    text = path.read_text(encoding="utf-8")
    assert "- `model.engine`: tensorrt_rtx 1.7" in text and "was built again on 2026-02-03" in text
    assert text.endswith("My own words.\n") and "/srv/x" not in text and text.count("## Files and gate") == 1
    assert not caplog.records
    path.write_text("Mine alone.", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        renew_card(path, with_engine())
    assert path.read_text(encoding="utf-8") == "Mine alone."
    assert [record.message for record in caplog.records] == [
        "README.md has no section on files and gate any more: it stays as it is"
    ]
