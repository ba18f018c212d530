"""One worker of a prediction on a cluster: a model, loaded once, that does parts of a job. Knows no Ray."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from data_pipeline.common.errors import CorruptFileError, SaveError, UserError
from data_pipeline.common.text import printable
from infer.predict.decode import DecoderName
from infer.predict.resume import identity_of
from infer.predict.rows import ErrorRow
from infer.predictor import Predictor
from infer.ray.job_folder import JobFolder, digest_of, load_job
from infer.ray.job_inputs import PartInputs, item_of, witness_of
from infer.ray.part_files import write_part
from infer.runtime.choose import BackendName, DeviceName


class WorkerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is told.

    Args:
        folder: the job's; the same path on all machines.
        job_sha256: of the job as the driver wrote it.
        model: the bundle's folder; the same path on all machines.
        backend, device, decoder, batch_size: see `infer.predictor.Predictor`.
        threads: for decoding, and for a model on the CPU.
        strict: an input that cannot be read ends the job.
    """

    folder: str
    job_sha256: str
    model: str
    backend: BackendName
    device: DeviceName
    decoder: DecoderName
    batch_size: int
    threads: int
    strict: bool


class PartResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a part.

    Args:
        number: which.
        images, errors: its rows, and how many of them are errors.
        seconds: what it took.
        host: where.
        backend, provider, device, precision, runs_on: as they really were.
        failure: why the job must end; empty if it need not.
        exit_code: what the command then answers with.
    """

    number: int
    images: int = 0
    errors: int = 0
    seconds: float = 0.0
    host: str
    backend: str = ""
    provider: str = ""
    device: str = ""
    precision: str = ""
    runs_on: str = ""
    failure: str = ""
    exit_code: int = 1


class PartWorker:
    """Predicts parts and writes their files. What a user can act on comes back as a `PartResult`.

    Args:
        options: a `WorkerOptions` as JSON, so that nothing depends on how it travels.
    """

    def __init__(self, options: str) -> None:
        self._options = msgspec.json.decode(options, type=WorkerOptions)
        self._predictor: Predictor | None = None
        self._failure: Exception | None = None
        try:
            self._job = self._open_job()
            self._predictor = self._load()
        except (UserError, CorruptFileError) as error:
            self._failure = error

    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> dict[str, list[bytes]]:
        """Ray Data's face: numbers of parts in, a `PartResult` as JSON for each out."""
        return {"result": [msgspec.json.encode(self.predict_part(int(number))) for number in batch["item"]]}

    def predict_part(self, number: int) -> PartResult:
        """Predict a part and write its file."""
        started, host = time.perf_counter(), socket.gethostname()
        try:
            if self._failure is not None:
                raise self._failure
            assert self._predictor is not None
            inputs, part, base = self._job.inputs_of(number), self._job.job.parts[number], self._base()
            self._check_witnesses(inputs)
            rows = list(self._predictor(item_of(one, base) for one in inputs.inputs))
            failed = [row for row in rows if isinstance(row, ErrorRow)]
            if failed and self._options.strict:
                raise CorruptFileError(f"{failed[0].path}: {failed[0].error} (--strict)")
            write_part(self._job.part_path(number), self._job.job.format, part.first, rows)
        except (UserError, CorruptFileError, SaveError) as error:
            return PartResult(
                number=number, host=host, failure=f"on worker {host}: {error}", exit_code=error.exit_code
            )
        backend = self._predictor.backend
        return PartResult(
            number=number,
            images=len(rows),
            errors=len(failed),
            seconds=time.perf_counter() - started,
            host=host,
            backend=backend.name,
            provider=backend.provider,
            device=backend.device,
            precision=backend.precision,
            runs_on=self._predictor.runs_on,
        )

    def close(self) -> None:
        """Free the model."""
        if self._predictor is not None:
            self._predictor.close()

    def _base(self) -> Path:
        return Path(os.fsdecode(self._job.job.base))

    def _open_job(self) -> JobFolder:
        folder = Path(self._options.folder)
        job = load_job(folder)
        if job is None or digest_of(folder) != self._options.job_sha256:
            what = "is not there" if job is None else "holds another job"
            raise UserError(
                f"{printable(folder)} {what}: --output must be a folder that all machines share, at one path"
            )
        return JobFolder(folder, job)

    def _load(self) -> Predictor:
        options, identity = self._options, self._job.job.identity
        if not Path(options.model).exists():
            raise UserError(
                f"{printable(options.model)} is not there: "
                "the model must lie at the same path on all machines"
            )
        predictor = Predictor(
            options.model,
            backend=options.backend,
            device=options.device,
            decoder=options.decoder,
            batch_size=options.batch_size,
            threads=options.threads,
            top=identity.top,
            min_probability=identity.min_probability,
            ten_crop=identity.ten_crop,
        )
        here = identity_of(
            predictor.bundle,
            top=identity.top,
            min_probability=identity.min_probability,
            ten_crop=identity.ten_crop,
        )
        if here != identity:
            predictor.close()
            raise UserError(f"{printable(options.model)} is another model than on the machine that asks")
        return predictor

    def _check_witnesses(self, part: PartInputs) -> None:
        """Whether this machine reads what the one that made the plan read."""
        base = self._base()
        for witness in part.witnesses:
            one = part.inputs[witness.place]
            found = witness_of(one, base)
            if found != witness.sha256:
                what = (
                    "cannot be read" if found is None else "has other content than where the job was started"
                )
                raise UserError(
                    f"{printable(base / os.fsdecode(one.path))} {what}: "
                    "inputs must lie at the same path on all machines"
                )
