"""A worker of a prediction on a cluster: loads the model once, and predicts parts of a job. Knows no Ray."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.common.errors import CorruptFileError, SaveError, UserError
from data_pipeline.common.files import sha256_of
from data_pipeline.common.text import printable
from infer.predict.resume import manifest_digest
from infer.predict.rows import ErrorRow
from infer.predict.table import RowCounter, Summary
from infer.predictor import Predictor
from infer.ray.job_folder import INPUTS_NAME, Plan
from infer.ray.part_files import write_part


class PartResult(NamedTuple):
    """A part that is done: on which machine, by what, and its counts."""

    host: str
    runs_on: str
    summary: Summary


class PartWorker:
    """Predicts parts and writes their files.

    Args:
        plan: of the job; its folder is at the same path on all machines.
        model: the folder of the bundle; at the same path on all machines.
        strict: whether an input that cannot be read ends the job.
        how: keyword arguments of the `Predictor`.
    """

    def __init__(self, plan: Plan, model: Path, strict: bool, how: dict[str, Any]) -> None:
        self._plan, self._model, self._strict, self._how = plan, model, strict, how
        self.predictor: Predictor | None = None

    def __call__(self, row: dict[str, int]) -> dict[str, PartResult | Exception]:
        """Predict the part whose number is the row's `item`.

        An error that a user can act on is a result: of one that is raised, Ray would make a traceback.
        """
        host = socket.gethostname()
        try:
            return {"item": self.predict(row["item"], host)}
        except (UserError, CorruptFileError, SaveError) as error:
            return {"item": type(error)(f"on worker {host}: {error}")}

    def predict(self, number: int, host: str = "") -> PartResult:
        """Predict a part and write its file."""
        predictor = self.predictor = self.predictor or self._load()
        counter = RowCounter(predictor.backend)
        items = [one.item() for one in self._plan.inputs(number)]
        rows = [one.row for one in counter.count(predictor.rows(items))]
        failed = next((row for row in rows if isinstance(row, ErrorRow)), None)
        if failed is not None and self._strict:
            raise CorruptFileError(f"{failed.path}: {failed.error} (--strict)")
        write_part(self._plan, number, rows)
        return PartResult(host, predictor.runs_on, counter.summary())

    def _load(self) -> Predictor:
        """Load the model, if this machine sees the same inputs and the same model as the driver."""
        inputs = self._plan.folder / INPUTS_NAME
        if not inputs.exists() or sha256_of(inputs) != self._plan.job.inputs_sha256:
            raise UserError(
                f"{printable(inputs)} is not that of the job: --output must be a folder that all machines "
                "share, at one path"
            )
        predictor = Predictor(self._model, **self._how)
        if manifest_digest(predictor.bundle) != self._plan.job.identity.model_sha256:
            predictor.close()
            raise UserError(f"{printable(self._model)} is another model than on the machine that asks")
        return predictor
