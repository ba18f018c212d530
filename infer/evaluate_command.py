"""What the commands that serve do, put together from the parts. Imports neither torch nor train."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

import msgspec

from data_pipeline.common.errors import UserError
from data_pipeline.datasets.open import open_dataset
from infer.bundle.load import Bundle, find_bundle, load_bundle
from infer.evaluate import Evaluation, evaluate_bundle
from infer.runtime.choose import DeviceName, choose_backend

log = logging.getLogger("infer")


def evaluate_exported(
    path: Path, data: Path | None, *, split: str, device: DeviceName, ten_crop: bool = False
) -> Evaluation:
    """Loss, top-1 and top-5 of a bundle.

    Args:
        path: the bundle.
        data: folder with the split; None for the data of the run that the bundle lies in.
        split: which folder of the data.
        device: see `infer.runtime.choose.choose_backend`.
        ten_crop: see `evaluate_bundle`.
    Raises:
        UserError: no data, or other classes than the bundle's.
    """
    bundle = load_bundle(find_bundle(path))
    root = data or data_of_run(bundle)
    dataset = open_dataset(root, split)
    choice = choose_backend(bundle, device=device)
    with closing(choice.backend):
        log.info(f"runs on: {choice.sentence}")
        return evaluate_bundle(bundle, choice.backend, dataset, ten_crop=ten_crop)


def data_of_run(bundle: Bundle) -> Path:
    """The data folder of the run that a bundle lies in; a bundle itself holds no paths."""
    config = bundle.folder.parent.parent / "config.json"
    try:
        root = msgspec.json.decode(config.read_bytes(), type=_RunConfig).data.root
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        root = None
    if root is None:
        raise UserError(f"{bundle.folder} does not lie in a run that names its data: use --data DIR")
    return Path(root)


class _RunData(msgspec.Struct):
    root: str | None = None


class _RunConfig(msgspec.Struct):
    """What is wanted of a run's `config.json`."""

    data: _RunData
