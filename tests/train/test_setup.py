"""From the data folder to predicted rows: excluded images are left out and counted, a resume on other images
is refused, and readable class names arrive."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from alexnet import main
from data_pipeline.datasets.exclude_list import QUARANTINE, read_exclude_list, write_exclude_list
from data_pipeline.datasets.image_folder import load_image_folder
from data_pipeline.datasets.open import open_dataset
from data_pipeline.sharding.write import write_shards
from infer.bundle.load import Bundle, load_bundle
from tests.helpers.checkpoint_samples import save_small_network
from tests.helpers.images import write_folder
from tests.helpers.infer_samples import tiny_manifest
from tests.helpers.ranks import TINY, link_subset, read_rows
from tests.helpers.warm_ranks import run_ranks
from train.checkpoints.load import find_checkpoint, load_checkpoint
from train.weights import export_weights, import_weights

pytestmark = pytest.mark.usefixtures("thin")

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SETTINGS = [f"--set={s}" for s in (*TINY, "epochs=1", "global_batch=25", "checkpoint_every=2")]


def train(data: Path, cwd: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """On one rank."""
    return run_ranks(1, ["train.main", f"--data={data}", "--out=runs", *SETTINGS, *options], cwd=cwd)


@pytest.fixture(scope="module")
def trained(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Digits with readable names, of which one was found broken; a run on them; and what it printed."""
    base = tmp_path_factory.mktemp("chain")
    data = link_subset(demo_data, base / "data", num_train=101, num_val=20)
    words = "".join(f"{number}\t{name}, {number}\n" for number, name in enumerate(NAMES))
    (data / "words.txt").write_text(words)
    broken = sorted((data / "train" / "3").iterdir())[1]
    content = broken.read_bytes()
    broken.unlink()
    broken.write_bytes(content[:-30])
    verified = CliRunner().invoke(main, ["data", "verify", str(data)])
    assert verified.exit_code == 3, verified.output
    assert list(read_exclude_list(data / QUARANTINE)) == [f"train/3/{broken.name}"]
    folder, _ = save_small_network(base / "earlier" / "checkpoints")
    done = train(data, base, f"--init={folder}")
    assert done.returncode == 0, done.stderr
    assert f"init from {folder}: 16 tensors loaded, the head among them" in done.stderr.splitlines()
    assert "train: 1 of 101 images in quarantine left out" in done.stderr.splitlines()
    (run,) = (base / "runs").iterdir()
    return data, run, done.stdout


@pytest.mark.slow
def test_training_leaves_out_and_counts_excluded_images(trained: tuple[Path, Path, str]) -> None:
    data, run, printed = trained
    result = msgspec.json.decode(printed)
    assert result["num_quarantined"] == {"train": 1, "val": 0}
    rows = read_rows(run, "train")
    assert [(row["samples"], row["failed"]) for row in rows] == [(25, 0)] * 4  # 100 of 101: no tail either
    checkpoint = load_checkpoint(find_checkpoint(run))
    assert checkpoint.data["train"] == open_dataset(data, "train").contents()
    assert (checkpoint.data["train"].num_samples, checkpoint.data["train"].num_quarantined) == (100, 1)


@pytest.mark.slow
def test_resume_with_other_training_images_is_refused(trained: tuple[Path, Path, str]) -> None:
    data, run, _ = trained
    path = data / QUARANTINE
    listed = read_exclude_list(path)
    try:
        write_exclude_list(
            path, listed | {f"train/5/{sorted((data / 'train' / '5').iterdir())[0].name}": "blurred"}
        )
        init = f"--init={load_checkpoint(find_checkpoint(run)).config.init_from}"
        refused = train(data, run.parent.parent, "--resume=auto", init)
        assert refused.returncode == 2
        (error,) = (line for line in refused.stderr.splitlines() if line.startswith("error:"))
        assert error.startswith(f"error: cannot resume: the train images of {data} are not those that runs/")
        assert (
            "(100 and 1 in quarantine then, 99 and 2 in quarantine now), so the order would change" in error
        )
        assert error.endswith(
            "restore the data and its quarantine list, name where they are with --data DIR, "
            "or start a new run with --resume none"
        )
        assert "Traceback" not in refused.stderr

        write_exclude_list(
            path, listed | {f"val/5/{sorted((data / 'val' / '5').iterdir())[0].name}": "blurred"}
        )
        shutil.rmtree(run.parent.parent / "earlier")  # a run that goes on does not need it
        told = train(data, run.parent.parent, "--resume=auto", init)
        assert told.returncode == 0, told.stderr
        assert (
            "(20 and 0 in quarantine then, 19 and 1 in quarantine now): metrics before and after"
            in told.stderr
        )
    finally:
        write_exclude_list(path, listed)
    assert len(list(run.parent.iterdir())) == 1


@pytest.mark.slow
def test_readable_names_reach_the_bundle_and_the_rows(
    trained: tuple[Path, Path, str], demo_data: Path, tmp_path: Path
) -> None:
    data, run, _ = trained
    checkpoint = load_checkpoint(find_checkpoint(run))
    assert checkpoint.classes == tuple("0123456789") and checkpoint.labels_text == NAMES
    exported = CliRunner().invoke(main, ["export", str(run), "--out", str(tmp_path / "bundle")])
    assert exported.exit_code == 0, exported.output
    manifest = load_bundle(tmp_path / "bundle").manifest
    assert manifest.classes == tuple("0123456789") and manifest.class_labels == NAMES
    inspected = CliRunner().invoke(main, ["checkpoint", "inspect", str(run)])
    record = msgspec.json.decode(inspected.stdout)["init"]
    assert record["source"].endswith("earlier/checkpoints/step-00000003") and len(record["loaded"]) == 16
    assert msgspec.to_builtins(manifest.checkpoint.init) == {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.items()
    }
    assert f"began with {record['source']}: 16 tensors loaded" in exported.output
    image = sorted((demo_data / "val" / "7").iterdir())[0]
    arguments = ["predict", str(image), "--model", str(tmp_path / "bundle"), "--device", "cpu"]
    rows = CliRunner().invoke(main, [*arguments, "--format", "jsonl", "--top", "10"])
    (row,) = map(msgspec.json.decode, rows.stdout.splitlines())
    assert {p["class_id"]: p["label"] for p in row["predictions"]} == dict(enumerate(NAMES))
    assert all(p["class"] == str(p["class_id"]) for p in row["predictions"])
    table = CliRunner().invoke(main, arguments)
    assert any(name in table.stdout for name in NAMES)
    best = row["predictions"][0]
    assert table.stdout.splitlines()[0].split()[:3] == ["image", "#1", "class"]
    assert f"{best['probability']:.1%}  {best['class']}" in table.stdout
    # by its classes' own names the bundle finds the data again
    evaluated = CliRunner().invoke(
        main, ["evaluate", str(tmp_path / "bundle"), "--data", str(data), "--json"]
    )
    assert msgspec.json.decode(evaluated.stdout)["num_samples"] == 20

    weights = tmp_path / "weights.safetensors"
    export_weights(checkpoint, weights, "safetensors")
    found = load_checkpoint(import_weights(weights, tmp_path / "imported"))
    assert (found.classes, found.labels_text, found.data) == (checkpoint.classes, NAMES, {})


def test_labels_text_must_have_one_label_for_each_class() -> None:
    named = msgspec.structs.replace(tiny_manifest(), labels_text=("house cat", "house dog"))
    assert named.class_labels == ("house cat", "house dog")
    assert Bundle(Path(), tiny_manifest()).manifest.class_labels == ("cat", "dog")
    with pytest.raises(ValueError, match="1 labels for 2 classes"):
        msgspec.structs.replace(tiny_manifest(), labels_text=("house cat",))


def test_contents_are_equal_where_the_stream_is_equal(tmp_path: Path) -> None:
    write_folder(tmp_path / "data" / "train", {"a": 3, "b": 2}, side=16)
    first = load_image_folder(tmp_path / "data", "train")
    contents = first.contents()
    assert contents.num_samples == 5 and contents == load_image_folder(tmp_path / "data", "train").contents()
    write_shards(tmp_path / "data", tmp_path / "shards", shard_bytes=4000)
    assert open_dataset(tmp_path / "shards", "train").contents() == contents
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    assert load_image_folder(tmp_path / "copy", "train").contents() == contents
    other = [first.take(np.array(order)).contents().sha256 for order in ([1, 0, 2, 3, 4], [0, 1, 2, 3])]
    (tmp_path / "copy" / "train" / "b" / "001.jpg").rename(tmp_path / "copy" / "train" / "a" / "2.jpg")
    other.append(load_image_folder(tmp_path / "copy", "train").contents().sha256)
    (tmp_path / "copy" / "train" / "b").rename(tmp_path / "copy" / "train" / "c")
    other.append(load_image_folder(tmp_path / "copy", "train").contents().sha256)
    assert len({contents.sha256, *other}) == 5
