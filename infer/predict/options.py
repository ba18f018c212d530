"""The options of `alexnet predict`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from infer.predict.decode import DecoderName
from infer.predict.rows import DEFAULT_BATCH
from infer.predict.writers import Format
from infer.runtime.choose import BackendName, DeviceName


class PredictOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The command's options, as the command line gives them.

    Args:
        paths: see `infer.predict.inputs.find_inputs`.
        model: a bundle; None for the newest export, which is named on stderr.
        backend, device, decoder, top, batch_size, min_probability, ten_crop: see `infer.predictor.Predictor`.
        recursive: whether to enter folders inside folders.
        strict: the first input that cannot be read ends the run.
        resume: go on after the rows that `output` has.
        format: how rows are written; None for what the name of `output` says, else a table.
        output: the file to write; None for stdout.
        html: a gallery to write besides.
        engine: who does the work: this process, or workers of a Ray cluster that write a folder of parts.
        address: which Ray cluster; None for one of its own on this machine.
        workers: how many; None for as many as the cluster has room for.
        part_rows: inputs a part; None for a number that suits how many there are.
    """

    paths: Sequence[str]
    model: Path | None = None
    backend: BackendName = "auto"
    device: DeviceName = "auto"
    decoder: DecoderName = "auto"
    top: int | None = None
    batch_size: int = DEFAULT_BATCH
    min_probability: float = 0.0
    ten_crop: bool = False
    recursive: bool = True
    strict: bool = False
    resume: bool = False
    format: Format | None = None
    output: Path | None = None
    html: Path | None = None
    engine: Literal["local", "ray"] = "local"
    address: str | None = None
    workers: int | None = None
    part_rows: int | None = None
