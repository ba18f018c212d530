"""`alexnet data verify`: finds what training would not read, lists it, and takes back what was repaired."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from alexnet import main
from data_pipeline.common.errors import ImageError, UserError
from data_pipeline.datasets.exclude_list import QUARANTINE, read_exclude_list
from data_pipeline.datasets.open import open_dataset
from data_pipeline.decode.pillow import decode_checked
from data_pipeline.inspect.verify import verify
from data_pipeline.sharding.write import write_shards
from tests.helpers.images import broken, encode, huge_png, kinds, photo, write_folder

BAD_NAME = os.fsdecode(b"caf\xe9.jpg")
WHOLE = encode(photo(30, 40), "JPEG")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["data", "verify", *(str(a) for a in arguments)])


def make_folder(root: Path) -> Path:
    """100 images of two classes; four of them cannot be decoded, one of these named in Latin-1."""
    write_folder(root / "train", {"a": 45, "b": 35}, side=16)
    write_folder(root / "val", {"a": 10, "b": 6}, side=16)
    (root / "train" / "a" / "007.jpg").write_bytes(WHOLE[:-20])
    (root / "train" / "a" / BAD_NAME).write_bytes(b"text")
    (root / "train" / "b" / "huge.png").write_bytes(huge_png())
    (root / "val" / "b" / "empty.jpg").touch()
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "data")


FOUND = {
    "train/a/007.jpg": "truncated JPEG: image file is truncated (",
    f"train/a/{BAD_NAME}": "not an image of a known format",
    "train/b/huge.png": "30000 x 30000 pixels are above the limit of 100000000",
    "val/b/empty.jpg": "empty file",
}


def assert_found(listed: dict[str, str]) -> None:
    assert list(listed) == list(FOUND)
    for name, reason in FOUND.items():
        assert listed[name].startswith(reason)


@pytest.mark.slow
def test_undecodable_files_are_listed_and_give_code_3(folder: Path) -> None:
    result = run(folder, "--workers", "2")
    assert result.exit_code == 3, result.stderr
    said = result.stdout.splitlines()
    assert said[0] == "train: 79 of 82 images can be decoded"
    assert "  train/a/caf\\xe9.jpg: not an image of a known format" in said[2]
    assert said[4] == "val: 16 of 17 images can be decoded"
    assert said[-1] == f"{folder}/quarantine.jsonl lists 4 (4 new): training leaves them out"
    assert "verify train: 82/82, 3 cannot be decoded" in result.stderr
    assert_found(read_exclude_list(folder / QUARANTINE))
    train, val = open_dataset(folder, "train"), open_dataset(folder, "val")
    assert (len(train), train.num_quarantined, len(val), val.num_quarantined) == (79, 3, 16, 1)


@pytest.mark.slow
def test_repaired_files_leave_the_list_on_another_run(folder: Path) -> None:
    first = json.loads(run(folder, "--workers=1", "--json").stdout)
    assert (first["clean"], first["num_listed"], first["num_added"]) == (False, 4, 4)
    path = folder / QUARANTINE
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    again = json.loads(run(folder, "--workers=1", "--json").stdout)
    assert (again["num_listed"], again["num_added"], again["repaired"]) == (4, 0, [])
    assert again["splits"] == first["splits"] and first["splits"]["train"]["num_bad"] == 3
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before

    (folder / "train" / "a" / BAD_NAME).write_bytes(WHOLE)
    (folder / "train" / "b" / "huge.png").unlink()
    only_val = json.loads(run(folder, "--workers=1", "--json", "--split", "val").stdout)
    assert (only_val["num_listed"], only_val["repaired"]) == (4, [])  # the other split's entries stay
    train = json.loads(run(folder, "--workers=1", "--json", "--split", "train").stdout)
    assert [row["path"] for row in train["repaired"]] == ["train/a/caf\\xe9.jpg", "train/b/huge.png"]
    assert list(read_exclude_list(path)) == ["train/a/007.jpg", "val/b/empty.jpg"]

    (folder / "train" / "a" / "007.jpg").write_bytes(WHOLE)
    (folder / "val" / "b" / "empty.jpg").write_bytes(WHOLE)
    clean = run(folder, "--workers=1")
    assert clean.exit_code == 0 and not path.exists()
    assert clean.stdout.splitlines()[-1] == "nothing is damaged: no quarantine list is needed"
    assert "  val/b/empty.jpg (was: empty file)" in clean.stdout


@pytest.mark.slow
def test_verify_finds_the_same_with_any_number_of_workers(folder: Path) -> None:
    reports = []
    for workers in (1, 2, 3):
        reports.append(verify(folder, workers=workers).splits)
        (folder / QUARANTINE).unlink()
    assert reports[0] == reports[1] == reports[2]
    with pytest.raises(UserError, match="--workers 0: at least 1"):
        verify(folder, workers=0)


def test_checked_decoder_agrees_with_the_reference_decoder() -> None:
    for data in kinds(60, 80).values():
        decode_checked(data, 100_000_000)
    reasons = {}
    for kind, data in broken(60, 80).items():
        with pytest.raises(ImageError) as raised:
            decode_checked(data, 100_000_000)
        reasons[kind] = str(raised.value)
    assert reasons["jpeg, 20 bytes short"].startswith("truncated JPEG")
    assert reasons["empty"] == "empty file"
    with pytest.raises(ImageError, match="60 x 50 pixels are above the limit of 2999"):
        decode_checked(encode(photo(50, 60), "PNG"), 2999)


def test_verify_reads_tiny_imagenet_in_its_own_layout(tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    for synset_id in ("n01", "n02"):
        write_folder(root / "train" / synset_id, {"images": 3}, side=16, suffix=".JPEG")
    write_folder(root / "val", {"images": 4}, side=16, suffix=".JPEG")
    rows = [f"{n:03d}.JPEG\tn0{1 + n % 2}\t0\t0\t9\t9\n" for n in range(4)]
    (root / "val" / "val_annotations.txt").write_text("".join(rows))
    (root / "val" / "images" / "002.JPEG").write_bytes(WHOLE[:200])
    assert run(root).exit_code == 3
    assert list(read_exclude_list(root / QUARANTINE)) == ["val/images/002.JPEG"]
    assert len(open_dataset(root, "val")) == 3


@pytest.fixture
def shards(folder: Path) -> Path:
    write_shards(folder, folder.parent / "shards", shard_bytes=30_000, workers=1)
    return folder.parent / "shards"


def entries(root: Path, split: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((root / "dataset.json").read_bytes())["splits"][split]
    return found


@pytest.mark.slow
def test_shards_give_the_findings_of_files_by_member_name(folder: Path, shards: Path) -> None:
    report = verify(shards, workers=2)
    num_shards = len(entries(shards, "train"))
    assert num_shards > 2 and report.splits[0].num_shards_hashed == num_shards
    want = open_dataset(folder, "train", quarantine=False)
    names = [f"train/{path}" for path in want.paths]
    found = {f"{int(Path(path).stem)}": reason for path, reason in report.splits[0].bad}
    of_files = dict(verify(folder, workers=1).splits[0].bad)
    assert found == {str(names.index(n)): of_files[n] for n in FOUND if n in names}
    assert all(path.startswith("train/shard-0000") for path, _ in report.splits[0].bad)
    assert open_dataset(shards, "train").num_quarantined == 3
    assert list(open_dataset(shards, "train").paths) == list(open_dataset(folder, "train").paths)


def test_verify_names_a_shard_with_a_wrong_hash(shards: Path) -> None:
    """Bits that rot in a label or in a comment of an image spoil no decoding."""
    first = entries(shards, "train")[0]
    path = shards / "train" / first["name"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the zeros at the end, which nothing reads
    path.write_bytes(content)
    result = run(shards, "--split", "train", "--json", "--workers", "1")
    assert result.exit_code == 3
    found = json.loads(result.stdout)["splits"]["train"]
    assert found["damaged_shards"] == ["train/shard-000000.tar"] and found["num_bad"] == 3
    assert f"shard {path} is not what was written: its hash differs; copy or write it again" in result.stderr
    for name in ("train", "val"):
        shutil.rmtree(shards / name)
    assert run(shards).exit_code == 2


def test_verify_reads_foreign_shards_without_hashes(shards: Path, tmp_path: Path) -> None:
    for path in sorted((shards / "train").glob("*.tar")):
        (tmp_path / f"mine-train-{path.name}").write_bytes(path.read_bytes())
    report = verify(tmp_path, ["train"], workers=1)
    assert report.splits[0].num_shards_hashed == 0 and len(report.splits[0].bad) == 3
    assert all(path.startswith("mine-train-shard-") for path, _ in report.splits[0].bad)
    assert open_dataset(tmp_path, "train").num_quarantined == 3
    assert verify(tmp_path, ["train"], workers=1).repaired == ()


@pytest.fixture
def read_only(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, in which no list can be written: as root, modes forbid nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (folder / f".{QUARANTINE}.writing").mkdir()
    return folder


def test_list_of_read_only_data_goes_to_the_users_cache(
    read_only: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = run(read_only, "--workers", "1")
    (kept,) = (tmp_path / "cache").rglob(QUARANTINE)
    assert result.exit_code == 3 and result.stdout.splitlines()[1].startswith("  train/a/007.jpg: truncated")
    assert result.stdout.splitlines()[-1] == f"{kept} lists 4 (4 new): training leaves them out"
    where = read_only / QUARANTINE
    assert f"the quarantine list {where} could not be written: Is a directory; it is kept in" in result.stderr
    monkeypatch.setattr(logging.getLogger("data_pipeline"), "propagate", True)  # the command ended that
    with caplog.at_level(logging.INFO, "data_pipeline"):
        assert open_dataset(read_only, "train").num_quarantined == 3
    assert caplog.messages == [f"train: 3 of 82 images in quarantine left out, by the list {kept}"]
    again = json.loads(run(read_only, "--json", "--workers", "1").stdout)
    assert (again["num_added"], again["quarantine"], again["unsaved"]) == (0, str(kept), None)

    (read_only / f".{QUARANTINE}.writing").rmdir()
    (read_only / "val" / "b" / "empty.jpg").write_bytes(WHOLE)
    assert run(read_only, "--workers", "1").exit_code == 3
    assert len(read_exclude_list(where)) == 3 and not kept.exists(), "it would outdo a list beside the data"


def test_stale_list_of_read_only_data_is_outdone(read_only: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"path": name, "reason": "old"}) + "\n" for name in (*FOUND, "train/a/001.jpg")]
    (read_only / QUARANTINE).write_text("".join(rows))
    os.utime(read_only / QUARANTINE, ns=(0, 0))
    assert open_dataset(read_only, "train").num_quarantined == 4
    assert [name for name, _ in verify(read_only, workers=1).repaired] == ["train/a/001.jpg"]
    assert open_dataset(read_only, "train").num_quarantined == 3
    (read_only / QUARANTINE).touch()  # somebody has renewed it since
    assert open_dataset(read_only, "train").num_quarantined == 4


def test_result_comes_first_where_no_list_can_be_written(read_only: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    result = run(read_only, "--json", "--workers", "1")
    found = json.loads(result.stdout)
    assert result.exit_code == 3 and found["splits"]["train"]["num_bad"] == 3 and found["quarantine"] is None
    unsaved = found["unsaved"]
    assert "Is a directory; nor in the user's cache: " in unsaved
    assert result.stderr.splitlines()[-1] == f"warning: {unsaved}; name another file with --list FILE"
    text = run(read_only, "--workers", "1")
    assert text.exit_code == 3 and "  train/a/007.jpg: truncated JPEG" in text.stdout


def test_list_goes_where_it_is_told(read_only: Path, tmp_path: Path) -> None:
    listed = tmp_path / "mine.jsonl"
    result = run(read_only, "--list", listed, "--workers", "1")
    assert result.exit_code == 3 and f"{listed} lists 4 (4 new)" in result.stdout
    assert_found(read_exclude_list(listed))
    assert not (tmp_path / "cache").exists() and not (read_only / QUARANTINE).exists()
    assert open_dataset(read_only, "train", quarantine=listed).num_quarantined == 3
    for taken in (read_only / "train" / "a" / "000.jpg", read_only / "train"):
        before = taken.read_bytes() if taken.is_file() else b""
        refused = run(read_only, "--list", taken, "--workers", "1")
        assert refused.exit_code == 2 and refused.stderr.count("\n") == 1
        assert not before or taken.read_bytes() == before


def test_reports_count_what_was_passed_over(folder: Path) -> None:
    (folder / "train" / "a" / "x.heic").touch()
    (folder / "train" / "loose.jpg").write_bytes(WHOLE)
    found = json.loads(run(folder, "--json", "--workers", "1").stdout)["splits"]
    assert (found["train"]["passed_over"], found["train"]["num_loose"]) == ({".heic": 1}, 1)
    assert (found["val"]["passed_over"], found["val"]["num_loose"]) == ({}, 0)
    line = "passed over: 1 file that is no image (1 .heic), 1 image beside the class folders"
    assert f"  {line}" in run(folder, "--workers", "1").stdout.splitlines()
    info = CliRunner().invoke(main, ["data", "info", str(folder), "--workers", "1"])
    assert f"train: {line.replace(':', '', 1)}" in info.stdout.splitlines()
