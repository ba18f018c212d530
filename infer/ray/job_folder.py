"""A prediction cut into parts that any process can do on its own: the folder of the plan and the rows.

    OUT/_job.json              the model, the options, and where each part's inputs stand
    OUT/_inputs.bin            the inputs, part after part
    OUT/part-000000.parquet    rows, in the order of the inputs; whole or absent
    OUT/_summary.json          written when all parts are there

Readers of Parquet datasets pass over names that begin with an underscore.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NamedTuple

import msgspec

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import fsync_path, write_atomic
from data_pipeline.common.text import printable
from infer.predict.resume import RunIdentity, check_identity
from infer.predict.rows import Item
from infer.ray.job_inputs import Input, PartInputs, input_of, witnesses_of

PartFormat = Literal["jsonl", "parquet"]
JOB_NAME = "_job.json"
INPUTS_NAME = "_inputs.bin"
SUMMARY_NAME = "_summary.json"
MIN_PART_ROWS, MAX_PART_ROWS, UNKNOWN_PART_ROWS = 256, 4096, 2048
WANTED_PARTS = 32


class Part(msgspec.Struct, frozen=True, array_like=True):
    """Where the inputs of a part stand.

    Args:
        first: place of its first input among all.
        count: how many there are.
        offset, size_bytes: where they stand in the file of inputs.
        sha256: of those bytes.
    """

    first: int
    count: int
    offset: int
    size_bytes: int
    sha256: str


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`_job.json`. `base` is the folder that relative paths start from."""

    schema: Literal[1] = 1
    format: PartFormat
    part_rows: Annotated[int, msgspec.Meta(ge=1)]
    identity: RunIdentity
    base: bytes
    parts: tuple[Part, ...]

    @property
    def num_inputs(self) -> int:
        """How many rows the job has in the end."""
        return sum(part.count for part in self.parts)


class JobFolder(NamedTuple):
    """A job and the folder that it lies in."""

    folder: Path
    job: Job

    def part_path(self, number: int) -> Path:
        """The file of a part's rows."""
        return self.folder / f"part-{number:06d}.{self.job.format}"

    def inputs_of(self, number: int) -> PartInputs:
        """The inputs of a part, held against the job's hash of them.

        Raises:
            CorruptFileError: they are not those that were planned.
        """
        part, path = self.job.parts[number], self.folder / INPUTS_NAME
        try:
            with path.open("rb") as file:
                file.seek(part.offset)
                data = file.read(part.size_bytes)
        except OSError as error:
            raise CorruptFileError(f"cannot read {printable(path)}: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != part.sha256:
            raise CorruptFileError(f"{printable(path)} is not what {JOB_NAME} says: start the job again")
        return msgspec.msgpack.decode(data, type=PartInputs)


def digest_of(folder: Path) -> str:
    """Hash of a folder's job: whether two machines see the same one.

    Raises:
        UserError: there is none.
    """
    try:
        return hashlib.sha256((folder / JOB_NAME).read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {printable(folder / JOB_NAME)}: {error.strerror or error}") from error


def load_job(folder: Path) -> Job | None:
    """The job of a folder; None where there is none.

    Raises:
        CorruptFileError: it is damaged.
    """
    path = folder / JOB_NAME
    try:
        return msgspec.json.decode(path.read_bytes(), type=Job)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{printable(path)} is damaged: {error}; remove the folder") from error


def plan_job(
    folder: Path,
    items: Iterable[Item],
    *,
    format: PartFormat,
    identity: RunIdentity,
    part_rows: int | None,
    total: int | None,
    resume: bool,
) -> JobFolder:
    """Cut inputs into parts and write them down, in memory for one part; go on with a job that is the same.

    Args:
        folder: made if it is not there.
        items: the inputs, in order.
        format: of the parts.
        identity: the model and the options.
        part_rows: inputs a part; None for a number that suits `total`, or for that of the job that is there.
        total: how many inputs there are; None if nobody knows.
        resume: whether to go on with the job that is there.
    Raises:
        UserError: a folder with something else in it; with `resume`, another model, other options or other
            inputs than the job was begun with; no inputs.
    """
    begun = _open_folder(folder, resume)
    if begun is not None:
        check_identity(begun.identity, identity, folder)
        for name, before, now in (
            ("--format", begun.format, format),
            ("--part-rows", begun.part_rows, part_rows or begun.part_rows),
        ):
            if before != now:
                raise UserError(f"--resume: {printable(folder)} was begun with {name} {before}, not {now}")
    rows = begun.part_rows if begun is not None else part_rows or rows_for(total)
    if rows < 1:
        raise UserError(f"--part-rows {rows}: at least 1")
    base = Path.cwd()
    old = JobFolder(folder, begun) if begun is not None else None
    temporary = folder / f".{INPUTS_NAME}.writing"
    try:
        with temporary.open("wb") as file:
            parts = tuple(_write_parts(file, items, rows, base, old))
        if begun is not None and len(parts) < len(begun.parts):
            raise UserError(f"--resume: {printable(folder)} was begun with more inputs: give the same ones")
        if not parts:
            raise UserError("the lists and shards that were given name no images")
        job = Job(format=format, part_rows=rows, identity=identity, base=os.fsencode(base), parts=parts)
        fsync_path(temporary)
        temporary.replace(folder / INPUTS_NAME)
    finally:
        temporary.unlink(missing_ok=True)
    write_atomic(folder / JOB_NAME, msgspec.json.encode(job))
    return JobFolder(folder, job)


def rows_for(total: int | None) -> int:
    """Inputs a part: enough parts to share out, and enough rows in each that a model runs full batches.

    >>> rows_for(None), rows_for(1000), rows_for(50_000), rows_for(10**7)
    (2048, 256, 1563, 4096)
    """
    if total is None:
        return UNKNOWN_PART_ROWS
    return min(MAX_PART_ROWS, max(MIN_PART_ROWS, -(-total // WANTED_PARTS)))


def _open_folder(folder: Path, resume: bool) -> Job | None:
    """The job to go on with, or None for a new one in a folder that is now there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        begun = load_job(folder)
        others = begun is None and any(not path.name.startswith(".") for path in folder.iterdir())
    except OSError as error:
        raise UserError(f"cannot write {printable(folder)}: {error.strerror or error}") from error
    if begun is not None and not resume:
        raise UserError(
            f"{printable(folder)} holds a job: go on with it by --resume, or give another --output"
        )
    if others:
        raise UserError(f"{printable(folder)} holds other things than a job: give another folder as --output")
    return begun


def _write_parts(
    file: BinaryIO, items: Iterable[Item], rows: int, base: Path, old: JobFolder | None
) -> Iterator[Part]:
    source, first = iter(items), 0
    while group := tuple(input_of(item) for item in itertools.islice(source, rows)):
        number = first // rows
        if old is not None:
            _check_inputs(old, number, group, base)
        data = msgspec.msgpack.encode(PartInputs(group, witnesses_of(group, base)))
        yield Part(first, len(group), file.tell(), len(data), hashlib.sha256(data).hexdigest())
        file.write(data)
        first += len(group)


def _check_inputs(old: JobFolder, number: int, group: tuple[Input, ...], base: Path) -> None:
    """Whether a part has the inputs that it was begun with, by their names."""
    if number >= len(old.job.parts):
        raise UserError(f"--resume: {printable(old.folder)} was begun with fewer inputs: give the same ones")
    before = old.inputs_of(number).inputs
    for place, (was, now) in enumerate(itertools.zip_longest(before, group)):
        if old.job.base != os.fsencode(base) and not os.path.isabs(now.path if now else b"/"):  # noqa: PTH117
            raise UserError(
                f"--resume: {printable(old.folder)} was begun in {printable(os.fsdecode(old.job.base))}, "
                "where relative paths start: go there first"
            )
        if was is None or now is None or was.path != now.path:
            names = [printable(os.fsdecode(one.path)) if one is not None else "nothing" for one in (was, now)]
            raise UserError(
                f"--resume: input {old.job.parts[number].first + place + 1} of {printable(old.folder)} was "
                f"{names[0]}, and now it is {names[1]}: give the inputs that it was begun with"
            )
