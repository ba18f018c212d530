"""A prediction cut into parts: the plan, going on with it, and a worker that checks what it sees; no Ray."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet
import pytest

from data_pipeline.common.errors import UserError
from data_pipeline.common.text import printable
from infer import Predictor, find_inputs
from infer.bundle.load import Bundle
from infer.predict.resume import RunIdentity, identity_of
from infer.ray.job_folder import INPUTS_NAME, JobFolder, PartFormat, digest_of, load_job, plan_job
from infer.ray.job_inputs import FailedInput, FileInput, MemberInput
from infer.ray.part_files import KeptPart, kept_parts
from infer.ray.worker import PartResult, PartWorker, WorkerOptions

IDENTITY = RunIdentity(model_sha256="1" * 64, top=5, min_probability=0.0, ten_crop=False)


def plan(folder: Path, paths: Sequence[str | Path], resume: bool = False, **changes: Any) -> JobFolder:
    inputs = find_inputs(paths)
    options: dict[str, Any] = {
        "format": "jsonl", "identity": IDENTITY, "part_rows": 2, "total": inputs.total, "resume": resume
    }  # fmt: skip
    return plan_job(folder, inputs, **{**options, **changes})


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


def test_inputs_are_written_down_by_parts(tmp_path: Path, files: list[Path]) -> None:
    arguments = write_inputs(tmp_path, files)
    job = plan(tmp_path / "job", arguments)
    assert [part.count for part in job.job.parts] == [2, 2, 2, 2] and job.job.num_inputs == 8
    parts = [job.inputs_of(number) for number in range(4)]
    inputs = [one for part in parts for one in part.inputs]
    kinds = [MemberInput, MemberInput, MemberInput, FailedInput, FileInput, FileInput, FileInput, FileInput]
    assert [type(one) for one in inputs] == kinds
    names = [printable(os.fsdecode(one.path)) for one in inputs]
    assert names[0] == f"{tmp_path}/s.tar/deep/0.jpg" and names[3:6] == [
        f"{tmp_path}/s.tar", f"{tmp_path}/caf\\xe9\n.jpg", "gone.jpg"
    ]  # fmt: skip
    assert [[w.place for w in part.witnesses] for part in parts] == [[0], [0], [0], [0, 1]]
    assert load_job(tmp_path / "job") == job.job
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == ["_inputs.bin", "_job.json"]


def test_a_job_goes_on_only_as_what_it_was_begun_as(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files[0].parent)
    paths: list[str | Path] = [*files[:4], Path(files[0].name)]
    folder = tmp_path / "job"
    begun = plan(folder, paths)
    with pytest.raises(UserError, match="holds a job: go on with it by --resume"):
        plan(folder, paths)
    assert plan(folder, paths, resume=True).job == begun.job
    assert plan(folder, paths, resume=True, part_rows=None).job == begun.job
    other = msgspec.structs.replace
    for changes, words in (
        (
            {"identity": other(IDENTITY, model_sha256="2" * 64)},
            "are of another model .its bundle.json has",
        ),
        ({"identity": other(IDENTITY, top=3)}, "begun with top 5, and now it is 3: give --top as it was"),
        ({"identity": other(IDENTITY, min_probability=0.5)}, "give --min-probability as it was"),
        ({"identity": other(IDENTITY, ten_crop=True)}, "begun with ten_crop False, and now it is True"),
        ({"format": "parquet"}, "was begun with --format jsonl, not parquet"),
        ({"part_rows": 3}, "was begun with --part-rows 2, not 3"),
    ):
        with pytest.raises(UserError, match=words):
            plan(folder, paths, resume=True, **changes)
    for others, words in (
        ([*paths[:3], files[5], paths[4]], f"input 4 of .* was {files[3]}, and now it is {files[5]}"),
        (paths[:4], "was begun with more inputs"),
        (paths[:3], f"input 4 of .* was {files[3]}, and now it is nothing"),
        ([*paths, files[5]], f"input 6 of .* was nothing, and now it is {files[5]}"),
    ):
        with pytest.raises(UserError, match=words):
            plan(folder, others, resume=True)
    shutil.copy(files[0], tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"was begun in {files[0].parent}, where relative paths start"):
        plan(folder, paths, resume=True)
    assert sorted(path.name for path in folder.iterdir()) == ["_inputs.bin", "_job.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds other things than a job"):
        plan(tmp_path / "other", paths)


def make_worker(job: JobFolder, bundle: Bundle, **changes: Any) -> PartWorker:
    options = WorkerOptions(
        folder=str(job.folder),
        job_sha256=digest_of(job.folder),
        model=str(bundle.folder),
        backend="onnx",
        device="cpu",
        decoder="pillow",
        batch_size=2,
        threads=1,
        strict=False,
    )
    return PartWorker(msgspec.json.encode(msgspec.structs.replace(options, **changes)).decode())


def rows_in(job: JobFolder) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number in range(len(job.job.parts)):
        path = job.part_path(number)
        if job.job.format == "jsonl":
            rows += [json.loads(line) for line in path.read_bytes().splitlines()]
        else:
            rows += pyarrow.parquet.read_table(path).to_pylist()
    return rows


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_parts_hold_the_rows_of_one_process(
    tmp_path: Path,
    bundle: Bundle,
    files: list[Path],
    format: PartFormat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = write_inputs(tmp_path, files)
    identity = identity_of(bundle, top=3, min_probability=0.01, ten_crop=False)
    job = plan(tmp_path / "job", arguments, part_rows=3, format=format, identity=identity)
    how: Any = {"device": "cpu", "decoder": "pillow", "batch_size": 2, "top": 3, "min_probability": 0.01}
    with Predictor(bundle.folder, **how) as predictor:
        expected = msgspec.to_builtins(list(predictor(find_inputs(arguments))))
    monkeypatch.chdir(tmp_path)  # a worker starts elsewhere
    worker = make_worker(job, bundle)
    results = [worker.predict_part(number) for number in (2, 0, 1)]
    worker.close()
    assert [(r.number, r.images, r.errors, r.failure) for r in results] == [
        (2, 2, 0, ""), (0, 3, 1, ""), (1, 3, 2, "")
    ]  # fmt: skip
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
    assert list(kept_parts(job)) == [KeptPart(0, 3, 1), KeptPart(1, 3, 2), KeptPart(2, 2, 0)]
    whole = job.part_path(1).read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", job.part_path(0).read_bytes()):
        job.part_path(1).write_bytes(damaged)
        (one,) = [part for part in kept_parts(job) if not isinstance(part, KeptPart)]
        assert f"part-000001.{format} is not whole and is predicted again: " in one


def failure_of(worker: PartWorker, number: int = 0) -> str:
    result = worker.predict_part(number)
    worker.close()
    assert (result.images, result.exit_code) == (0, 2) and result.failure.startswith("on worker ")
    return result.failure


def test_a_worker_that_sees_other_files_says_so(tmp_path: Path, bundle: Bundle, files: list[Path]) -> None:
    copies = [Path(shutil.copy(file, tmp_path)) for file in files[:2]]
    identity = identity_of(bundle, top=5, min_probability=0, ten_crop=False)
    job = plan(tmp_path / "job", copies, identity=identity)
    gone = make_worker(job, bundle, folder=str(tmp_path / "elsewhere"))
    assert "elsewhere is not there: --output must be a folder that all machines share" in failure_of(gone)
    another = make_worker(job, bundle, job_sha256="0" * 64)
    assert "job holds another job: --output must be a folder" in failure_of(another)
    no_model = make_worker(job, bundle, model=str(tmp_path / "nothing"))
    assert "nothing is not there: the model must lie at the same path" in failure_of(no_model)
    other_job = plan(tmp_path / "other", copies)
    assert "is another model than on the machine that asks" in failure_of(make_worker(other_job, bundle))
    copies[0].write_bytes(files[4].read_bytes())
    assert "0.jpg has other content than where the job was started: inputs must lie at the same path" in (
        failure_of(make_worker(job, bundle)).replace(copies[0].name, "0.jpg")
    )
    copies[0].unlink()
    assert "cannot be read: inputs must lie at the same path" in failure_of(make_worker(job, bundle))
    assert not list((tmp_path / "job").glob("part-*"))
    with (tmp_path / "job" / INPUTS_NAME).open("r+b") as file:
        file.write(b"\0")
    result = make_worker(job, bundle).predict_part(0)
    assert result.exit_code == 1 and "_inputs.bin is not what _job.json says" in result.failure


def test_what_a_worker_cannot_do_comes_back_as_a_line(
    tmp_path: Path, bundle: Bundle, files: list[Path]
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    identity = identity_of(bundle, top=5, min_probability=0, ten_crop=False)
    job = plan(tmp_path / "job", [files[0], tmp_path / "broken.jpg"], identity=identity)
    worker = make_worker(job, bundle, strict=True)
    (answer,) = worker({"item": [0]})["result"]  # type: ignore[dict-item]
    worker.close()
    result = msgspec.json.decode(answer, type=PartResult)
    assert result.exit_code == 1 and f"{tmp_path}/broken.jpg: damaged JPEG" in result.failure
    assert result.failure.endswith("(--strict)") and not job.part_path(0).exists()
    job.part_path(0).mkdir()
    result = make_worker(job, bundle).predict_part(0)
    assert result.exit_code == 1 and "part-000000.jsonl: Is a directory" in result.failure
    assert not list(job.folder.glob(".part*"))
