"""A prediction cut into parts: the plan, resuming it, and a worker that checks what it sees; no Ray."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet
import pytest

from data_pipeline.common.errors import CorruptFileError, SaveError, UserError
from data_pipeline.common.text import printable
from data_pipeline.loader import ImageSource
from infer.bundle.load import Bundle
from infer.predict.inputs import find_inputs
from infer.predict.lists import PipedImage
from infer.predict.options import PredictOptions
from infer.predict.resume import RunIdentity, identity_of
from infer.predict.rows import ErrorRow, OkRow, Prediction, Row, RowShape
from infer.predictor import Predictor
from infer.ray.job_folder import INPUTS_NAME, JOB_NAME, Input, Job, PartFormat, Plan, plan_job
from infer.ray.parts import PartResult, PartWorker, completed_parts, write_part

IDENTITY = RunIdentity(model_sha256="1" * 64, top=5, min_probability=0.0, ten_crop=False)


def plan(
    folder: Path,
    paths: Sequence[str | Path],
    resume: bool = False,
    part_rows: int | None = 2,
    format: PartFormat = "jsonl",
    identity: RunIdentity = IDENTITY,
    overwrite: bool = False,
) -> Plan:
    options = PredictOptions(
        paths=[str(path) for path in paths], part_rows=part_rows, resume=resume, overwrite=overwrite
    )
    return plan_job(folder, find_inputs(paths), options, format, identity)


def write_inputs(folder: Path, files: Sequence[Path]) -> list[str | Path]:
    """A shard with a broken image in it and its end missing, a list with odd names, and a file."""
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    odd = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9\n.jpg"))
    shutil.copy(files[3], odd)
    with tarfile.open(folder / "s.tar", "w") as tar:
        for place, path in enumerate([files[0], folder / "broken.jpg", files[1]]):
            tar.add(path, f"deep/{place}{path.suffix}")
    whole = (folder / "s.tar").read_bytes()
    (folder / "s.tar").write_bytes(whole[: 512 * (len(whole.rstrip(b"\0")) // 512 + 1)])
    (folder / "list.txt").write_bytes(b"\0".join([os.fsencode(odd), b"gone.jpg", os.fsencode(odd)]))
    return [folder / "s.tar", f"@{folder}/list.txt", files[2]]


def test_ray_job_splits_its_inputs_into_parts(tmp_path: Path, files: list[Path]) -> None:
    arguments = write_inputs(tmp_path, files)
    job = plan(tmp_path / "job", arguments)
    parts = [job.inputs(number) for number in range(job.num_parts)]
    assert [len(part) for part in parts] == [2, 2, 2, 2] and job.num_inputs == 8
    inputs = [one for part in parts for one in part]
    assert [(one.offset is None, bool(one.reason)) for one in inputs] == [
        *[(False, False)] * 3, (True, True), *[(True, False)] * 4
    ]  # fmt: skip
    names = [printable(one.path) for one in inputs]
    assert names[0] == f"{tmp_path}/s.tar/deep/0.jpg" and names[3:6] == [
        f"{tmp_path}/s.tar", f"{tmp_path}/caf\\xe9\n.jpg", "gone.jpg"
    ]  # fmt: skip
    assert inputs[5].file == str(Path.cwd() / "gone.jpg")
    written = msgspec.json.decode((tmp_path / "job" / JOB_NAME).read_bytes(), type=Job)
    assert written == job.job
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == [INPUTS_NAME, JOB_NAME]


def test_ray_job_resumes_only_with_its_own_options(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files[0].parent)
    paths: list[str | Path] = [*files[:4], Path(files[0].name)]
    folder = tmp_path / "job"
    begun = plan(folder, paths)
    with pytest.raises(UserError, match="holds a job: --resume goes on with it, --overwrite replaces it"):
        plan(folder, paths)
    assert plan(folder, paths, resume=True) == begun
    assert plan(folder, paths, resume=True, part_rows=None) == begun
    other = msgspec.structs.replace
    changes: dict[str, dict[str, Any]] = {
        "are of another model .its bundle.json has": {"identity": other(IDENTITY, model_sha256="2" * 64)},
        "begun with top 5, and now it is 3: give --top as it was": {"identity": other(IDENTITY, top=3)},
        "give --min-probability as it was": {"identity": other(IDENTITY, min_probability=0.5)},
        "begun with ten_crop False, and now it is True": {"identity": other(IDENTITY, ten_crop=True)},
        "begun with format jsonl, and now it is parquet: give --format as it was": {"format": "parquet"},
        "begun with part_rows 2, and now it is 3: give --part-rows as it was": {"part_rows": 3},
    }
    for words, changed in changes.items():
        with pytest.raises(UserError, match=words):
            plan(folder, paths, resume=True, **changed)
    for others, words in (
        ([*paths[:3], files[5], paths[4]], f"input 4 of .* was {files[3]}, and now it is {files[5]}"),
        (paths[:4], f"input 5 of .* was {files[0]}, and now it is nothing"),
        (paths[:3], f"input 4 of .* was {files[3]}, and now it is nothing"),
        ([*paths, files[5]], f"input 6 of .* was nothing, and now it is {files[5]}"),
    ):
        with pytest.raises(UserError, match=words):
            plan(folder, others, resume=True)
    shutil.copy(files[0], tmp_path)
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / files[0].name
    with pytest.raises(UserError, match=f"input 5 of .* was {files[0]}, and now it is {elsewhere}"):
        plan(folder, paths, resume=True)
    assert sorted(path.name for path in folder.iterdir()) == [INPUTS_NAME, JOB_NAME]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds other things than a job"):
        plan(tmp_path / "other", paths)
    (folder / JOB_NAME).write_bytes(b"{")
    with pytest.raises(CorruptFileError, match=r"_job.json is damaged: .*; remove the folder"):
        plan(folder, paths, resume=True)


def test_ray_job_is_replaced_by_overwrite_alone(tmp_path: Path, files: list[Path]) -> None:
    folder = tmp_path / "job"
    begun = plan(folder, files[:4])
    for name in ("part-000000.jsonl", "part-000007.parquet", "_summary.json", "part-mine.txt"):
        (folder / name).touch()
    again = plan(folder, files[:2], overwrite=True)
    assert (begun.num_inputs, again.num_inputs) == (4, 2) and again.job != begun.job
    kept = sorted(path.name for path in folder.iterdir())
    assert kept == [INPUTS_NAME, JOB_NAME, "part-mine.txt"]
    (folder / JOB_NAME).write_bytes(b'{"mine": 1}')
    with pytest.raises(CorruptFileError, match=r"_job.json is damaged"):
        plan(folder, files[:2], overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds other things than a job"):
        plan(tmp_path / "other", files[:2], overwrite=True)


def test_ray_gets_no_image_of_stdin(tmp_path: Path, files: list[Path]) -> None:
    image = ImageSource(Path("-"), PipedImage(io.BytesIO(), files[0].read_bytes()))
    with pytest.raises(
        UserError, match="an image on stdin cannot be sent to Ray's workers: write it to a file"
    ):
        Input.of(image)


@contextmanager
def open_worker(job: Plan, model: Path, strict: bool = False, **changes: Any) -> Iterator[PartWorker]:
    how: dict[str, Any] = {"device": "cpu", "decoder": "pillow", "batch_size": 2, "threads": 1, **changes}
    worker = PartWorker(job, model, strict, how)
    yield worker
    if worker.predictor is not None:
        worker.predictor.close()


def rows_in(job: Plan) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number in range(job.num_parts):
        path = job.part_path(number)
        if job.job.format == "jsonl":
            rows += [json.loads(line) for line in path.read_bytes().splitlines()]
        else:
            rows += pyarrow.parquet.read_table(path).to_pylist()
    return rows


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_ray_parts_name_classes_as_the_data_does(
    tmp_path: Path, files: list[Path], format: PartFormat
) -> None:
    job = plan(tmp_path / "job", files[:2], part_rows=2, format=format)
    best = Prediction(class_id=1, class_name="n01443537", label="goldfish", probability=0.5)
    named: list[Row] = [
        OkRow(path=str(files[0]), predictions=(best,)),
        ErrorRow(path=str(files[1]), error="empty file"),
    ]
    write_part(job, 0, named, RowShape(1, named=True))
    first, second = rows_in(job)
    assert first["predictions"] == [msgspec.to_builtins(best)] and second.get("predictions") is None
    assert first["predictions"][0]["class"] == "n01443537" and completed_parts(job) == {0: 1}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_ray_parts_hold_the_rows_of_one_process(
    tmp_path: Path,
    bundle: Bundle,
    files: list[Path],
    format: PartFormat,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    arguments = write_inputs(tmp_path, files)
    how: Any = {"device": "cpu", "decoder": "pillow", "batch_size": 2, "top": 3, "min_probability": 0.01}
    options = PredictOptions(paths=[], **how)
    job = plan(tmp_path / "job", arguments, part_rows=3, format=format, identity=identity_of(bundle, options))
    with Predictor(bundle.folder, **how) as predictor:
        expected = msgspec.to_builtins(list(predictor(find_inputs(arguments))))
    monkeypatch.chdir(tmp_path)  # a worker starts elsewhere
    with open_worker(job, bundle.folder, top=3, min_probability=0.01) as worker:
        results = [worker.predict(number) for number in (2, 0, 1)]
    assert [(r.summary.images, r.summary.errors) for r in results] == [(2, 0), (3, 1), (3, 2)]
    assert "CPUExecutionProvider, fp32, on cpu" in results[0].runs_on
    rows = rows_in(job)
    assert [row.pop("index") for row in rows] == list(range(8))
    kept = [{k: v for k, v in row.items() if v is not None} for row in rows]
    assert [row["path"] for row in kept] == [row["path"] for row in expected]
    for row, other in zip(kept, expected, strict=True):
        for one, two in zip(row.pop("predictions", []), other.pop("predictions", []), strict=True):
            assert one.pop("probability") == pytest.approx(two.pop("probability"), abs=1e-6)
            assert one == two
    assert kept == expected
    assert completed_parts(job) == {0: 1, 1: 2, 2: 0} and not caplog.records
    whole = job.part_path(1).read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", job.part_path(0).read_bytes()):
        job.part_path(1).write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert completed_parts(job) == {0: 1, 2: 0}
        (line,) = caplog.messages
        assert f"part-000001.{format} is not whole and is predicted again: " in line


def failure_of(job: Plan, model: Path) -> str:
    with open_worker(job, model) as worker:
        error = worker({"item": 0})["item"]
    assert isinstance(error, UserError) and str(error).startswith("on worker ")
    return str(error)


def test_ray_worker_reports_files_that_differ(tmp_path: Path, bundle: Bundle, files: list[Path]) -> None:
    copies = [Path(shutil.copy(file, tmp_path)) for file in files[:2]]
    identity = identity_of(bundle, PredictOptions(paths=[]))
    job = plan(tmp_path / "job", copies, identity=identity)
    not_shared = "_inputs.jsonl is not that of the job: --output must be a folder that all machines share"
    (tmp_path / "elsewhere").mkdir()
    assert not_shared in failure_of(job._replace(folder=tmp_path / "elsewhere"), bundle.folder)
    another = plan(tmp_path / "another", copies[:1], identity=identity)
    assert not_shared in failure_of(job._replace(folder=another.folder), bundle.folder)
    assert f"{tmp_path}/nothing does not exist" in failure_of(job, tmp_path / "nothing")
    other_model = plan(tmp_path / "other", copies)
    assert "is another model than on the machine that asks" in failure_of(other_model, bundle.folder)
    with (tmp_path / "job" / INPUTS_NAME).open("r+b") as file:
        file.write(b" ")
    assert not_shared in failure_of(job, bundle.folder)
    for folder in ("job", "elsewhere", "another", "other"):
        assert not list((tmp_path / folder).glob("*part-*"))


@pytest.mark.slow
def test_ray_worker_failure_is_one_line(tmp_path: Path, bundle: Bundle, files: list[Path]) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    identity = identity_of(bundle, PredictOptions(paths=[]))
    job = plan(tmp_path / "job", [files[0], tmp_path / "broken.jpg"], identity=identity)
    with open_worker(job, bundle.folder, strict=True) as worker:
        error = worker({"item": 0})["item"]
    assert isinstance(error, CorruptFileError) and f"{tmp_path}/broken.jpg: damaged JPEG" in str(error)
    assert str(error).endswith("(--strict)") and not job.part_path(0).exists()
    job.part_path(0).mkdir()
    with open_worker(job, bundle.folder) as worker:
        error = worker({"item": 0})["item"]
        assert isinstance(error, SaveError) and "part-000000.jsonl: Is a directory" in str(error)
        assert not list(job.folder.glob(".part*"))
        job.part_path(0).rmdir()
        result = worker({"item": 0})["item"]
        assert isinstance(result, PartResult) and result.summary.errors == 1 and job.part_path(0).exists()
