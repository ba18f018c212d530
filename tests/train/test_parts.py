"""The small parts of the trainer: devices, ranks, precision, optimiser, counts, what may be resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.common.errors import CorruptFileError, UserError
from data_pipeline.common.files import sha256_of, write_json
from train.checkpoints.format import MANIFEST, STATE, Manifest, Pointer
from train.checkpoints.load import find_best
from train.config.load import make_config
from train.distributed.torchrun import choose_rank_count
from train.distributed.world import check_rank_count, choose_device, cpu_share, open_world
from train.health.metrics import AccuracyMeter
from train.optim.precision import choose_precision
from train.runs.folder import MetricsRow, create_run
from train.runs.resume import find_resumable

CPU = torch.device("cpu")


def test_more_ranks_than_gpus_is_an_error_that_says_how_many() -> None:
    with pytest.raises(UserError, match=r"4 processes on this machine, but it has 2 GPU\(s\): use --nproc 2"):
        check_rank_count(4, "cuda", num_gpus=2)
    check_rank_count(2, "cuda", num_gpus=2)
    check_rank_count(4, "cpu", num_gpus=0)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="this machine has a GPU; the error is for those without"
)
def test_cuda_without_a_gpu_is_an_error_and_never_a_cpu() -> None:
    with pytest.raises(UserError, match="sees no GPU"):
        choose_device("cuda")
    assert choose_device("auto") == "cpu"
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", CPU)


def test_float32_is_float32_in_a_run_and_as_it_was_after_it() -> None:
    before = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    with open_world("cpu"):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # type: ignore[attr-defined]
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == before  # type: ignore[attr-defined]


def test_nproc_takes_numbers_and_auto() -> None:
    config = make_config("demo", ["device=cpu"])
    assert choose_rank_count("auto", config) == 1
    assert choose_rank_count("3", config) == 3
    for wrong in ("0", "-1", "two", "1.5"):
        with pytest.raises(UserError, match="a number above 0, or auto"):
            choose_rank_count(wrong, config)


def test_a_rank_gets_its_share_of_the_cores() -> None:
    assert cpu_share(1) >= cpu_share(2) >= cpu_share(10_000) == 1


def test_precision_says_why() -> None:
    assert choose_precision("fp32", CPU).reason == "asked for"
    chosen = choose_precision("auto", CPU)
    assert chosen.name in ("bf16", "fp32")
    assert "CPU" in chosen.reason or "hardware" in chosen.reason
    assert not chosen.make_scaler().is_enabled()


def test_counts_are_integers_and_leave_out_what_could_not_be_read() -> None:
    logits_NC = torch.eye(8)[torch.tensor([0, 1, 2, 3])] * 9 + torch.arange(8) * 0.1
    labels_N = torch.tensor([0, 7, 0, 3])  # right; second; not among five; right, but unreadable
    valid_N = torch.tensor([True, True, True, False])
    counts = AccuracyMeter(CPU)
    counts.add(logits_NC, torch.tensor([1.0, 2.0, 3.0, 100.0]), labels_N, valid_N)
    other = AccuracyMeter(CPU)
    other.merge(counts)
    with open_world("cpu") as world:
        metrics = other.reduce(world)
        empty = AccuracyMeter(CPU).reduce(world)
    assert (metrics.num_samples, metrics.num_failed) == (3, 1)
    assert (metrics.top1, metrics.top5, metrics.loss) == (1 / 3, 2 / 3, 2.0)
    assert empty.num_samples == 0
    assert empty.top1 != empty.top1  # NaN, not 0


def row(step: int) -> MetricsRow:
    return MetricsRow(
        split="train", epoch=1, step=step, samples=1, failed=0, loss=1.0, top1=0.0, top5=0.0,
        lr=0.1, images_per_s=1.0, time=0.0,
    )  # fmt: skip


def test_rows_after_the_checkpoint_and_half_a_line_are_dropped(tmp_path: Path) -> None:
    folder = create_run(tmp_path, make_config("demo"))
    for step in (1, 2, 3):
        folder.append(row(step))
    with folder.metrics.open("ab") as file:
        file.write(b'{"split":"train","ep')
    assert folder.drop_rows_after(2) == 2
    assert folder.metrics.read_bytes().count(b"\n") == 2
    assert folder.drop_rows_after(2) == 0


def test_resuming_another_configuration_names_what_differs(tmp_path: Path) -> None:
    config = make_config("demo")
    assert find_resumable(tmp_path, "auto", config) is None
    assert find_resumable(tmp_path, "none", config) is None
    folder = create_run(tmp_path, config)
    (folder.checkpoints / "last.json").write_text('{"step": 5, "top1": 0.5}')
    with pytest.raises(CorruptFileError, match=r"no checkpoint of .* is whole"):
        find_resumable(tmp_path, "auto", config)
    found = write_checkpoint(folder.checkpoints, step=5, top1=0.5)
    assert find_resumable(tmp_path, "auto", make_config("demo", ["data.threads=3", "log_every=1"])) == found
    with pytest.raises(UserError, match=r"seed was 0, now 1; .*model.name was 'paper', now 'owt'"):
        find_resumable(tmp_path, "auto", make_config("demo", ["seed=1", "model.name=owt"]))
    with pytest.raises(UserError, match="does not exist"):
        find_resumable(tmp_path, str(tmp_path / "nothing"), config)
    (folder.path / "config.json").write_text("{")
    with pytest.raises(CorruptFileError, match=r"config.json is damaged"):
        find_resumable(tmp_path, "auto", config)


def write_checkpoint(folder: Path, *, step: int, top1: float) -> Path:
    """A checkpoint whose state is a few bytes: enough for whatever does not load it."""
    path = folder / f"step-{step:08d}"
    path.mkdir()
    (path / STATE).write_bytes(b"state")
    manifest = Manifest(
        format=1, step=step, epoch=1, sha256=sha256_of(path / STATE), size_bytes=5, metrics={"top1": top1}
    )
    write_json(path / MANIFEST, manifest)
    return path


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config("demo")
    folder = create_run(tmp_path, config)
    whole = write_checkpoint(folder.checkpoints, step=1, top1=0.3)
    best = write_checkpoint(folder.checkpoints, step=2, top1=0.9)
    flipped = write_checkpoint(folder.checkpoints, step=3, top1=0.95)
    truncated = write_checkpoint(folder.checkpoints, step=4, top1=0.4)
    bare = write_checkpoint(folder.checkpoints, step=5, top1=0.4)
    (folder.checkpoints / "last.json").write_text('{"step": 5, "top1": 0.4}')
    (flipped / STATE).write_bytes(b"stata")
    (truncated / STATE).write_bytes(b"")
    (bare / MANIFEST).unlink()
    assert find_resumable(tmp_path, "auto", config) == best
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [str(bad) in line for bad, line in zip((bare, truncated, flipped), said, strict=True)] == [
        True
    ] * 3
    assert find_best(folder.path, 2) == Pointer(step=2, top1=0.9)
    assert find_best(folder.path, 1) == Pointer(step=1, top1=0.3)
    assert whole.exists()


def test_runs_of_one_second_do_not_share_a_folder(tmp_path: Path) -> None:
    config = make_config("demo")
    folders = {create_run(tmp_path, config).path for _ in range(3)}
    assert len(folders) == 3
