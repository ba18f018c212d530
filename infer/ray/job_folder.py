"""A prediction cut into parts that any process can do on its own: the folder of the plan and the rows.

    OUT/_job.json              the model and the options
    OUT/_inputs.jsonl          the inputs, one a line
    OUT/part-000000.parquet    rows, in the order of the inputs; whole or absent
    OUT/_summary.json          written when all parts are there

Readers of Parquet datasets pass over names that begin with an underscore.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import fsync_path, read_file, sha256_of, write_atomic
from data_pipeline.common.text import printable
from data_pipeline.loader import ImageSource
from infer.predict.inputs import Inputs, Item, ShardMember, Unreadable, path_of
from infer.predict.lists import PipedImage
from infer.predict.options import PredictOptions
from infer.predict.resume import RunIdentity, check_identity, check_same
from infer.predict.writers import name_unwritable

JOB_NAME = "_job.json"
INPUTS_NAME = "_inputs.jsonl"
SUMMARY_NAME = "_summary.json"
_PART = re.compile(r"part-\d{6,}\.(jsonl|parquet)")


PartFormat = Literal["jsonl", "parquet"]


class Input(NamedTuple):
    """One input as it is written down: a file, an image in a tar shard, or one that is known to fail.

    Bytes of a path that are not UTF-8 are lone surrogates here, which JSON escapes.

    Attributes:
        path: its name as it was given.
        file: the absolute path of the file or shard.
        offset, size_bytes: its place in the shard; None for a file.
        reason: why it cannot be read; empty if it can.
    """

    path: str
    file: str
    offset: int | None = None
    size_bytes: int = 0
    reason: str = ""

    @classmethod
    def of(cls, item: Item) -> Input:
        """The input, to write down."""
        path, read = str(path_of(item)), item.read if isinstance(item, ImageSource) else None
        if isinstance(read, ShardMember):
            return cls(path, str(Path(read.shard).absolute()), read.offset, read.size_bytes)
        if isinstance(read, PipedImage):
            raise UserError("an image on stdin cannot be sent to Ray's workers: write it to a file")
        reason = read.reason if isinstance(read, Unreadable) else ""
        return cls(path, str(Path(path).absolute()), reason=reason)

    def item(self) -> ImageSource:
        """The input, to predict."""
        if self.reason:
            return ImageSource(Path(self.path), Unreadable(self.reason))
        if self.offset is not None:
            return ImageSource(Path(self.path), ShardMember(self.file, self.offset, self.size_bytes))
        return ImageSource(Path(self.path), partial(read_file, self.file))


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`_job.json`.

    Attributes:
        identity: the model and the options that decide the content of a row.
        format: of the parts.
        part_rows: inputs in each part but the last.
        inputs_sha256: of the file of inputs.
    """

    schema: Literal[1] = 1
    identity: RunIdentity
    format: PartFormat
    part_rows: int
    inputs_sha256: str


class Plan(NamedTuple):
    """A job as a worker needs it.

    Attributes:
        folder: of the job.
        job: as `_job.json` has it.
        offsets: where the inputs of each part begin in the file of inputs; the last one is its end.
        num_inputs: of all parts.
    """

    folder: Path
    job: Job
    offsets: list[int]
    num_inputs: int

    @property
    def num_parts(self) -> int:
        """Number of parts."""
        return len(self.offsets) - 1

    def part_path(self, number: int) -> Path:
        """The file of a part's rows."""
        return self.folder / f"part-{number:06d}.{self.job.format}"

    def inputs(self, number: int) -> list[Input]:
        """The inputs of a part."""
        first, end = self.offsets[number : number + 2]
        with (self.folder / INPUTS_NAME).open("rb") as file:
            file.seek(first)
            return [Input(*json.loads(line)) for line in file.read(end - first).splitlines()]


def plan_job(
    folder: Path, inputs: Inputs, options: PredictOptions, format: PartFormat, identity: RunIdentity
) -> Plan:
    """Cut inputs into parts and write the plan; or resume a job that is the same.

    Args:
        folder: made if it does not exist.
        inputs: of the job.
        options: `part_rows` of the command, or None to choose by the number of inputs, or to take that of the
            job to resume; and whether to `resume`.
        format: of the parts.
        identity: the model and the options that decide the content of a row.
    Raises:
        UserError: a folder with something else in it; to resume, another model, other options or other inputs
            than the job was begun with; no inputs.
        CorruptFileError: the job in the folder is damaged.
    """
    begun = _open_folder(folder, options)
    part_rows = options.part_rows or (begun.part_rows if begun else rows_for(inputs.total))
    job = Job(identity=identity, format=format, part_rows=part_rows, inputs_sha256="")
    inputs_to_write: Iterator[Input] = (Input.of(item) for item in inputs)
    if begun is not None:
        check_identity(begun.identity, identity, folder)
        check_same(begun, job, ("format", "part_rows"), f"--resume: the rows in {printable(folder)}")
        inputs_to_write = _same_inputs(folder, inputs_to_write)
    offsets, num_inputs, temporary = [0], 0, folder / f".{INPUTS_NAME}.writing"
    try:
        with temporary.open("wb") as file:
            while lines := [json.dumps(one).encode() + b"\n" for one in islice(inputs_to_write, part_rows)]:
                file.writelines(lines)
                offsets.append(file.tell())
                num_inputs += len(lines)
        if not num_inputs:
            raise UserError("the lists and shards that were given name no images")
        fsync_path(temporary)
        temporary.replace(folder / INPUTS_NAME)
    finally:
        temporary.unlink(missing_ok=True)
    job = msgspec.structs.replace(job, inputs_sha256=sha256_of(folder / INPUTS_NAME))
    write_atomic(folder / JOB_NAME, msgspec.json.encode(job))
    return Plan(folder, job, offsets, num_inputs)


def rows_for(total: int | None) -> int:
    """Inputs in a part: enough parts to share out, and enough rows in each that a model runs full batches.

    >>> rows_for(None), rows_for(1000), rows_for(50_000), rows_for(10**7)
    (2048, 256, 1563, 4096)
    """
    return 2048 if total is None else min(4096, max(256, -(-total // 32)))


def _open_folder(folder: Path, options: PredictOptions) -> Job | None:
    """Make the folder; the job in it to resume, or None for a new one, also in place of one to overwrite."""
    with name_unwritable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    where = printable(folder)
    if JOB_NAME not in names:
        if names:
            raise UserError(f"{where} holds other things than a job: give another folder as --output")
        return None
    if not options.resume and not options.overwrite:
        raise UserError(
            f"{where} holds a job: --resume goes on with it, --overwrite replaces it; or name another folder"
        )
    try:
        job = msgspec.json.decode((folder / JOB_NAME).read_bytes(), type=Job)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{where}/{JOB_NAME} is damaged: {error}; remove the folder") from error
    if options.resume:
        return job
    for name in sorted(names - {JOB_NAME}):
        if name in (INPUTS_NAME, SUMMARY_NAME) or _PART.fullmatch(name):
            (folder / name).unlink(missing_ok=True)
    (folder / JOB_NAME).unlink()  # last: until then the folder is known as a job
    return None


def _same_inputs(folder: Path, inputs: Iterable[Input]) -> Iterator[Input]:
    """Passes on inputs that are those of the job in the folder, by name and file; else raises UserError."""
    with (folder / INPUTS_NAME).open("rb") as file:
        begun = (Input(*json.loads(line)) for line in file)
        for place, (before, now) in enumerate(zip_longest(begun, inputs), 1):
            if before is None or now is None or before[:2] != now[:2]:
                # Shown by file: a relative path that was given in another folder is another input.
                shown = [printable(one.file) if one else "nothing" for one in (before, now)]
                raise UserError(
                    f"--resume: input {place} of {printable(folder)} was {shown[0]}, and now it is "
                    f"{shown[1]}: give the inputs that it was begun with"
                )
            yield now
