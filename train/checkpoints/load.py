"""Finding, verifying and loading checkpoints."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from data_pipeline.common.errors import CorruptFileError, UserError, raising
from data_pipeline.common.files import sha256_of
from data_pipeline.transforms.preprocessing import Preprocessing
from train.checkpoints.format import (
    COMPONENTS,
    FIELDS,
    MANIFEST,
    STATE,
    CheckpointPayload,
    Manifest,
    Pointer,
    Snapshot,
    Weights,
    read_manifest,
    read_pointer,
)
from train.checkpoints.retention import saved_steps, step_folder
from train.checkpoints.safe_load import load_plain
from train.config.load import decode_config
from train.config.schema import RunConfig
from train.models.alexnet import AlexNet, count_hidden_weights, make_model
from train.models.init import Uninitialized

log = logging.getLogger("train")

RECIPE_ADVICE = "use the recipe it was trained with"


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Snapshot):
    """A verified checkpoint in memory.

    Attributes:
        folder: the step's folder.
        sha256: of `state.pt`; exported models carry it.
    """

    folder: Path
    sha256: str

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing that the weights were trained with."""
        return self.config.preprocessing

    @property
    def model_state(self) -> dict[str, Tensor]:
        """The weights with which training resumes."""
        return self.states["model"]

    @property
    def average_state(self) -> dict[str, Tensor]:
        """Their moving average, where the run keeps one (`ema_decay`); else empty."""
        return self.states["average"]

    @property
    def class_labels(self) -> tuple[str, ...]:
        """The names of the classes for people, else the classes themselves."""
        return self.labels_text or self.classes

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that were evaluated, and that are exported: the average where there is one."""
        return self.average_state or self.model_state

    @property
    def weights_name(self) -> Weights:
        """Whether `weights` are the average or the last ones, as the command line names them."""
        return "average" if self.average_state else "last"

    @property
    def description(self) -> str:
        """The folder, and which weights of it are used, for log lines."""
        average = f": the average of its weights (ema_decay {self.config.ema_decay:g})"
        return f"{self.folder}{average if self.average_state else ''}"

    @property
    def run_folder(self) -> Path:
        """The run that this checkpoint belongs to."""
        return self.folder.parent.parent

    def make_model(self) -> AlexNet:
        """Build the network with the weights that were evaluated, in evaluation mode.

        Raises:
            UserError: weights that do not fit the configuration saved with them.
        """
        return make_model_with(self.config, self.weights, len(self.classes), self.folder).eval()


def make_model_with(
    config: RunConfig, weights: dict[str, Tensor], num_classes: int, source: Path, advice: str = RECIPE_ADVICE
) -> AlexNet:
    """Build the network of a configuration and load weights into it.

    The sizes are compared first, so that a file cannot make a network much larger than itself be built.

    Args:
        advice: what to do about weights that do not fit, for the message.

    Raises:
        UserError: weights that do not fit the configuration, with how they differ.
    """
    sizes = {"num_classes": num_classes, "crop_px": config.preprocessing.crop_px}
    wanted = count_hidden_weights(config.model, **sizes)
    found = sum(tensor.numel() for tensor in weights.values() if tensor.ndim == 2)
    if wanted != found:
        raise UserError(
            f"{source} holds another model's weights (its fully connected layers have {found} weights, those "
            f"of its configuration {wanted}); {advice}"
        )
    with Uninitialized():
        model = make_model(config.model, **sizes)
    load_weights(model, weights, source, advice)
    return model


def load_weights(
    model: torch.nn.Module, state: dict[str, Tensor], source: Path, advice: str = RECIPE_ADVICE
) -> None:
    """Load weights strictly.

    Args:
        advice: what to do about weights that do not fit, for the message.

    Raises:
        UserError: names or shapes that differ, with the first of each.
    """
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    if expected != found:
        odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        shown = f"{odd[0]}: expected {expected.get(odd[0], 'nothing')}, found {found.get(odd[0], 'nothing')}"
        raise UserError(
            f"{source} holds another model's weights ({len(odd)} tensors differ, first {shown}); {advice}"
        )
    model.load_state_dict(state)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Verify a checkpoint's hash, then load it. Nothing in it is executed.

    Raises:
        CorruptFileError: a missing or damaged manifest or state file, or one that is not ours.
        UserError: a checkpoint of another format, or a configuration that this version does not know.
    """
    manifest, path = verify_checkpoint(folder), folder / STATE
    state = load_plain(path)
    try:
        payload = msgspec.convert(state, CheckpointPayload)
        if payload.step != manifest.step:
            raise ValueError(f"it is of step {payload.step}, its manifest of step {manifest.step}")
        fields = {name: getattr(payload, name) for name in FIELDS}
        fields["config"] = decode_config(payload.config)
        states = {name: state[name] for name in COMPONENTS}
        return Checkpoint(
            folder=folder, sha256=manifest.sha256, metrics=manifest.metrics, states=states, **fields
        )
    except UserError as error:
        raise UserError(f"checkpoint {folder}: {error}") from error
    except ValueError as error:
        raise CorruptFileError(f"{path} is not a checkpoint of ours: {error}") from error


def verify_checkpoint(folder: Path) -> Manifest:
    """Compare a checkpoint's state file with its manifest, without loading it.

    Raises:
        CorruptFileError: a missing or damaged manifest or state file.
        UserError: a checkpoint of another format.
    """
    manifest = read_manifest(folder)
    path = folder / STATE
    if folder.parent.name == "checkpoints" and folder != step_folder(folder.parent, manifest.step):
        raise CorruptFileError(f"checkpoint {folder} has the manifest of step {manifest.step}")
    with raising(CorruptFileError, f"checkpoint {folder} has no {STATE}"):
        size_bytes = path.stat().st_size
    if not path.is_file():
        raise CorruptFileError(f"checkpoint {path} is no regular file")
    damage = ""
    if size_bytes != manifest.size_bytes:
        damage = f"it has {size_bytes} of {manifest.size_bytes} bytes"
    else:
        with raising(CorruptFileError, f"checkpoint {path} cannot be read"):  # training may have removed it
            if sha256_of(path) != manifest.sha256:
                damage = "its hash is not the one in its manifest"
    if damage:
        raise CorruptFileError(f"checkpoint {path} is damaged: {damage}; use an earlier one")
    return manifest


def find_checkpoint(path: Path | None, runs: Path = Path("runs"), pointer: str = "best") -> Path:
    """Find the folder of one checkpoint.

    Args:
        path: a step's folder or a file in it, a run's folder, or None for the newest run.
        runs: where to look for runs when `path` is None.
        pointer: `best` or `last`: which of a run's checkpoints to take.
    Raises:
        UserError: nothing there, with what to do.
        CorruptFileError: the run's pointer file is damaged.
    """
    if path is None:
        started = list(runs.glob("*/checkpoints/best.json"))
        if not started:
            raise UserError(f"no checkpoint under {runs}/; train first, or name one")
        path = max(started, key=lambda f: (f.stat().st_mtime_ns, f)).parent.parent
    if path.name == STATE or (path.name == MANIFEST and path.is_file()):
        path = path.parent
    if (path / MANIFEST).exists() or (path / STATE).exists():
        return path
    pointer_file = path / "checkpoints" / f"{pointer}.json"
    if not pointer_file.is_file():
        what = "does not exist" if not path.exists() else "is neither a checkpoint nor a run with one"
        raise UserError(f"{path} {what}")
    return step_folder(path / "checkpoints", read_pointer(pointer_file).step)


def find_newest_intact(run: Path) -> Path:
    """Find the newest checkpoint of a run that agrees with its manifest; each damaged one is logged.

    Raises:
        CorruptFileError: all are damaged.
    """
    for folder in reversed(saved_steps(run / "checkpoints").values()):
        try:
            verify_checkpoint(folder)
        except CorruptFileError as error:
            log.warning(f"{error}; going on from the checkpoint before it")
        else:
            return folder
    raise CorruptFileError(f"no checkpoint of {run} is whole; start a new run with --resume none")


def find_best(checkpoints: Path, last_step: int) -> Pointer | None:
    """Find the intact checkpoint with the highest top-1 up to a step, the earliest among equal ones.

    By the manifests: `best.json` may name a later one, or one from before a crash.
    """
    found = []
    for step, folder in saved_steps(checkpoints).items():
        with suppress(CorruptFileError):
            top1 = read_manifest(folder).metrics.get("top1")
            if step <= last_step and top1 is not None:
                found.append((top1, -step, folder))
    for top1, minus_step, folder in sorted(found, reverse=True):
        with suppress(CorruptFileError):
            verify_checkpoint(folder)
            return Pointer(step=-minus_step, top1=top1)
    return None
