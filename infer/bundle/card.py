"""The card of a bundle, `README.md`: how to load it, its preprocessing, and the gate's report.

What training has to say comes as text, since predicting does not import `train`. The section on files and
gate stands between two comments, so that an engine that is built later renews it alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from string import Template

from msgspec.structs import replace

from data_pipeline.common.errors import CorruptFileError
from data_pipeline.common.files import read_small
from data_pipeline.common.text import visible
from data_pipeline.results.card import (
    CARD_NAME,
    WEIGHTS_NAME,
    code,
    front_matter,
    licence_section,
    named_accuracies,
)
from data_pipeline.transforms.preprocessing import describe_preprocessing
from infer.bundle.describe import gate_lines
from infer.bundle.manifest import Manifest
from infer.bundle.schema import CPU_NAME, ENGINE_NAME, INPUT_NAME, MANIFEST_NAME, ONNX_NAME, OUTPUT_NAME

log = logging.getLogger("infer")

_BEGIN, _END = "<!-- alexnet: files and gate -->", "<!-- alexnet: end -->"

_LOAD = Template(f"""\
import json, numpy as np, onnxruntime
from PIL import Image, ImageOps

about = json.load(open("{MANIFEST_NAME}", encoding="utf-8"))
image, side, crop = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB"), $side, $crop
image = image.resize([side * extent // min(image.size) for extent in image.size], Image.Resampling.BILINEAR)
x, y = (round((extent - crop) / 2) for extent in image.size)
images = np.asarray(image.crop((x, y, x + crop, y + crop)))[None]  # uint8 RGB, NHWC
session = onnxruntime.InferenceSession("$file", providers=["CPUExecutionProvider"])
probabilities = session.run(["{OUTPUT_NAME}"], {{"{INPUT_NAME}": images}})[0][0].tolist()
print(*sorted(zip(probabilities, about["labels_text"] or about["classes"]), reverse=True)[:5], sep="\\n")
""")


def bundle_card(manifest: Manifest, data: str, training: Sequence[str]) -> str:
    """The card of a bundle in Markdown.

    Args:
        manifest: complete, with the gate's report.
        data: name of the training data; empty where it is not known.
        training: what the trainer says: paragraphs and sections.
    """
    origin = manifest.checkpoint
    accuracies = named_accuracies(origin.metrics)
    first, *sections = training
    return "\n\n".join(
        [
            front_matter(f"{origin.recipe}, {manifest.precision}", data, accuracies).rstrip(),
            f"# AlexNet `{origin.model}`, recipe {code(origin.recipe)}, {manifest.precision}",
            first,
            f"## Use\n\n{_use_text(manifest)}",
            f"## Preprocessing\n\n{describe_preprocessing(manifest.preprocessing)} The last step is part of "
            "the ONNX graph: its input are the 8-bit pixels.",
            *sections,
            gate_section(manifest),
            licence_section(data),
        ]
    ) + "\n"  # fmt: skip


def gate_section(manifest: Manifest) -> str:
    """The section on the files, their precision and the gate's report, between its comments."""
    assert manifest.report is not None
    rebuild = manifest.rebuild
    if rebuild is not None and rebuild.unknown is not None:  # an error's text, which may name places
        rebuild = replace(rebuild, unknown=f"it was not compared; {MANIFEST_NAME} says why")
    report = "\n".join(map(visible, gate_lines(manifest.report, rebuild)))
    files = [f"- `{ONNX_NAME}`: {manifest.precision_check.words()}"]
    if manifest.cpu is not None:
        files.append(f"- `{CPU_NAME}`: {manifest.cpu.words()}")
    if manifest.engine is not None:
        files.append(f"- `{ENGINE_NAME}`: {manifest.engine.words()}")
    files.append(f"- `{WEIGHTS_NAME}`: the checkpoint's weights in float32, for other programs")
    if manifest.calibration is not None:
        report = f"{visible(manifest.calibration.words())}\n{report}"
    return (
        f"{_BEGIN}\n## Files and gate\n\n"
        + "\n".join(files)
        + "\n\nBefore they were written, the models were compared with the checkpoint in torch, on "
        f"validation images:\n\n```\n{report}\n```\n{_END}"
    )


def renew_card(path: Path, manifest: Manifest) -> None:
    """Bring the section on files and gate of a copied card up to date; the rest stays, whoever wrote it.

    A card in which the section is not found stays as it is, and one line says so.

    Args:
        path: the card; nothing happens where there is none.
        manifest: of the bundle that the card will lie in.
    """
    if not path.is_file():
        return
    try:
        text = read_small(path).decode()
    except (CorruptFileError, UnicodeDecodeError):
        text = ""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        log.warning("%s has no section on files and gate any more: it stays as it is", CARD_NAME)
        return
    path.write_text(before + gate_section(manifest) + after, encoding="utf-8")


def _use_text(manifest: Manifest) -> str:
    preprocessing, cpu = manifest.preprocessing, manifest.cpu
    file = cpu.file if cpu else ONNX_NAME
    block = _LOAD.substitute(side=preprocessing.resize_px, crop=preprocessing.crop_px, file=file)
    needs = f" (`{cpu.file}` reads its weights from `{cpu.reads}`)" if cpu and cpu.reads else ""
    return (
        f"With plain ONNX Runtime, NumPy and Pillow, in this folder{needs}:\n\n```python\n{block}```\n\n"
        f"On a GPU: `{ONNX_NAME}` with `CUDAExecutionProvider`. The model takes batches of 1 to "
        f"{manifest.max_batch}. `alexnet predict` verifies the files and does the same for folders of images."
    )
